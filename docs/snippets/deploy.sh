#!/bin/sh
# deploy.sh RELEASE: a directory below /srv/shop/releases with the code
set -eu
release="/srv/shop/releases/$1"
former="$(readlink /srv/shop/current)"

python3 -m venv "$release/.venv"
"$release/.venv/bin/pip" install --quiet --requirement "$release/requirements.txt"

ln --symbolic --force --no-dereference "$release" /srv/shop/current
if ! systemctl reload shop; then
    ln --symbolic --force --no-dereference "$former" /srv/shop/current
    exit 1
fi
