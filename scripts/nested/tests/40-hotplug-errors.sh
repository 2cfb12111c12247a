#!/usr/bin/env bash
# What the hotplug scripts cannot do, they say, in xl's own output or in xenstore; and the guest is not started. And a
# disk as a device of dom0 without a guest, by `xl-colo nbd -c`.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

nested up a
# refused TEXT SED: creating pvh with its configuration changed by SED must fail, with TEXT in xl's words.
refused() {
	local out
	out=$(host a "sed '$2' /etc/xen/guests/pvh.cfg >/run/refused.cfg; xl create -q /run/refused.cfg 2>&1 && echo CREATED; xl destroy pvh 2>/dev/null; true")
	[[ $out != *CREATED* ]] || die "xl created a guest with $2"
	[[ $out == *"$1"* ]] || die "with $2 xl said: $out"
	echo "ok: $1"
}

host a 'xl destroy pvh 2>/dev/null; rm -f /run/xen-colo/pvh.disk0.sock; true'
refused 'xl-colo does not serve /run/xen-colo/pvh.disk0.sock: start xl-colo host first' ''
refused 'target must be GUEST/DISK' 's#target=pvh/disk0#target=pvh#'
host a 'socat UNIX-LISTEN:/run/xen-colo/pvh.disk0.sock /dev/null & sleep 1; kill -9 $!'
refused 'is xl-colo host running?' ''
host a 'rm -f /run/xen-colo/pvh.disk0.sock'
serve_disk a pvh
refused 'there is no bridge nowhere' 's#bridge=xenbr0#bridge=nowhere#'
holds "a failed creation leaves no nbd device behind" wait_until 20 host a '[[ ! -e /sys/block/nbd0/pid ]]'
holds "nor a veth" host a '[[ -z $(ls /sys/class/net | grep "^c[bn][0-9]") ]]'
unserve_disk a pvh

# Not the first device, whatever is free.
host a 'head -c 1000 /dev/urandom >/run/odd.img; truncate -s 4M /run/odd.img; mkdir -p /run/lock
	xl-colo nbd -c /dev/nbd7 -f raw --pid-file /run/odd.pid /run/odd.img && cmp /dev/nbd7 /run/odd.img'
echo "ok: a device is the image"
host a 'echo written | dd of=/dev/nbd7 bs=512 seek=8 conv=sync,fsync status=none'
holds "what is written to it is in the image" host a '[[ $(dd if=/run/odd.img bs=512 skip=8 count=1 status=none | head -n 1) == written ]]'
refused=$(host a 'xl-colo nbd -c /dev/nbd7 -f raw -r -k /run/second /run/odd.img 2>&1; echo "code $?"')
[[ $refused == *"is in use"*"code 1" ]] || die "a second server of the image: $refused"
refused=$(host a 'truncate -s 1M /run/other.img; xl-colo nbd -c /dev/nbd7 -f raw -k /run/second /run/other.img 2>&1; echo "code $?"')
[[ $refused == *"the kernel does not connect a device"*"code 1" ]] || die "a device that is another disk: $refused"
holds "a device that is a disk becomes no other" host a '[[ ! -e /run/second ]] && cmp /dev/nbd7 /run/odd.img'
host a 'xl-colo nbd -d /dev/nbd7; for i in $(seq 100); do [[ -d /proc/$(</run/odd.pid) ]] || exit 0; sleep 0.1; done; exit 1'
echo "ok: its server ends with it"
host a 'xl-colo nbd -c /dev/nbd7 -f raw --pid-file /run/odd.pid /run/odd.img && kill -TERM $(</run/odd.pid)'
let_go() { host a '[[ ! -e /sys/block/nbd7/pid ]]'; }
holds "and a device with its server" wait_until 20 let_go
