#!/usr/bin/env bash
# A host of a protected PVH guest is asked to end: at the secondary nobody takes over, at the primary the guest runs on,
# with its disk and its NIC; the dirty log is off either way, and nothing of ours is left in the hypervisor. A host that
# is started again goes on with it.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

start_secondary() {
	start_host b "--listen 10.78.0.2:9740"
}

protect() {
	RUN_SECONDS=300 host a "xl-colo protect 10.78.0.2:9740 --mode remus $PATIENT --wait"
	holds "the dirty log is on" is_logged
}

is_clean() {
	host b '! xl list pvh 2>/dev/null && ! xl list pvh--incoming 2>/dev/null'
}

nested up a b
clear_hosts pvh
start_secondary
start_host a "--listen 10.78.0.1:9740 --guest pvh --xen /etc/xen/guests/pvh.cfg --disk-mib 16"
wait_until 200 said a pvh GUEST-READY || die "the guest did not get ready"
protect

holds "the secondary ends when it is asked to" terminate b
holds "it has left nothing of the guest" is_clean
status=$(host a 'xl-colo status')
[[ $status == *'host b left the protection'* ]] || die "the primary says: $status"
echo "ok: the primary knows why"
holds "the dirty log is off" is_not_logged
holds "the guest runs" is_running pvh
expect "the guest answers" 201 "$(put a left value | sed s/200/201/)"

start_secondary
protect
holds "the primary ends when it is asked to" terminate a
said=$(host a 'tail -n 2 /run/a.out')
[[ $said == *'pvh is protected no longer; it runs on'*'pvh needs no xl-colo now: disk0 is '*'; its NIC is in xenbr0'* ]] ||
	die "it says: $said"
echo "ok: $said"
holds "the dirty log is off" is_not_logged
holds "the guest runs on" is_running pvh
holds "nobody has taken over" wait_until 20 is_clean
holds "nothing says that it is protected" host a '[[ ! -e /run/disks/a.img.colo-protected ]]'
expect "its NIC is where xl's own script would have put it" xenbr0 \
	"$(host a 'basename $(readlink /sys/class/net/vif$(xl domid pvh).0/master)')"
holds "somebody serves its disk" host a 'ps aux | grep -q "[x]l-colo nbd"'
expect "it answers" 201 "$(put b alone 'written without a host' | sed s/200/201/)"
expect "its disk, too" 'written without a host' "$(get b alone)"

start_host a "--listen 10.78.0.1:9740 --guest pvh --xen /etc/xen/guests/pvh.cfg --disk-mib 16"
holds "a host that starts again has taken its NIC back" host a '[[ ! -e /sys/class/net/vif$(xl domid pvh).0/master ]]'
holds "and its disk" host a '! ps aux | grep "[x]l-colo nbd"'
expect "what was written without a host is there" 'written without a host' "$(get b alone)"
protect
expect "a protected write" 201 "$(put b again value | sed s/200/201/)"
holds "the primary ends when it is asked to" terminate a
expect "the guest answers" value "$(get b again)"
host a 'xl destroy pvh'
holds "what served its disk has ended with the guest" wait_until 20 host a '! ps aux | grep "[x]l-colo nbd"'
host b 'xl-colo stop'
