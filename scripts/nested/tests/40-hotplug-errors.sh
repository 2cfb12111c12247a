#!/usr/bin/env bash
# What the hotplug scripts cannot do, they say, in xl's own output or in xenstore; and the guest is not started.
# shellcheck source-path=SCRIPTDIR source=../check.sh
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
# shellcheck disable=SC2016 # for dom0 to expand
holds "nor a veth" host a '[[ -z $(ls /sys/class/net | grep "^c[bn][0-9]") ]]'
unserve_disk a pvh
