#!/bin/sh
# A deploy hook of certbot: /etc/letsencrypt/renewal-hooks/deploy/shop
# $RENEWED_LINEAGE is the directory with the new fullchain.pem and privkey.pem.
set -eu
install --owner=root --group=shop --mode=0640 "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem" /etc/shop/
exec ecdysis restart --control /run/shop/control
