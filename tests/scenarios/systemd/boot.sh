#!/bin/bash
# Become a real systemd, PID 1 of the namespaces this was started in, over an overlay of this machine's root.
#   boot.sh SYSTEMD UNITS FOLDER…: where systemd is unpacked, where the units are, and the folders to see at their own
#   paths, UNITS among what is in them. The network is the machine's own, so that tests reach the services. Nothing
#   outside changes.
set -euo pipefail
systemd=$1
units=$2
shift 2
# A mount of its own: what the overlay writes goes to memory, and away with the namespace.
work=/run/ecdysis-test
mkdir -p $work
mount -t tmpfs -o mode=755 tmpfs $work
mkdir $work/{upper,work,root}
cp -a "$systemd/." $work/upper/
root=$work/root
mount -t overlay overlay -o lowerdir=/,upperdir=$work/upper,workdir=$work/work $root
mkdir -p $root/{proc,sys,dev,run,stubs}
mount -t proc -o nosuid,nodev,noexec proc $root/proc
mount -t sysfs -o nosuid,nodev,noexec,ro sysfs $root/sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 $root/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $root/dev
mkdir $root/dev/{pts,shm}
for node in null zero full random urandom tty; do
    touch $root/dev/$node
    mount --bind /dev/$node $root/dev/$node
done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts $root/dev/pts
ln -s pts/ptmx $root/dev/ptmx
ln -s /proc/self/fd $root/dev/fd
mount -t tmpfs -o mode=755 tmpfs $root/run
mount -t tmpfs -o mode=1777 tmpfs $root/dev/shm
# Of other file systems the overlay shows nothing.
for folder; do
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
done
# Of a whole system's units, no more than systemd itself asks for.
for target in basic multi-user paths slices sockets sysinit timers umount final; do
    printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' $target >$root/stubs/$target.target
done
printf '[Unit]\nDefaultDependencies=no\nRefuseManualStart=yes\n' >$root/stubs/shutdown.target
printf '[Unit]\nDefaultDependencies=no\nWants=systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket\n' \
    >$root/stubs/test.target
for unit in systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket; do
    sed -E '/^(Requires|After|Before|Wants)=/d' $root/usr/lib/systemd/system/$unit >$root/stubs/$unit
done
mkdir $root/.old
cd $root
pivot_root . .old
umount -l /.old
rm -f /etc/machine-id
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test "SYSTEMD_UNIT_PATH=$units:/stubs" LANG=C.UTF-8 \
    /lib/systemd/systemd --system --unit=test.target --log-target=journal-or-kmsg --show-status=no
