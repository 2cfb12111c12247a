#!/usr/bin/env bash
# A host of a protected PVH guest is asked to end: at the secondary nobody takes over, at the primary the guest runs on;
# the dirty log is off either way, and nothing of ours is left in the hypervisor.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

start_secondary() {
	start_host b "--listen 10.78.0.2:9740"
}

protect() {
	RUN_SECONDS=300 host a "xl-colo protect 10.78.0.2:9740 --mode remus $PATIENT --wait"
	holds "the dirty log is on" is_logged
}

# terminate HOST: SIGTERM, and the end of its process.
terminate() {
	host "$1" "kill -TERM \$(</run/$1.pid); for i in \$(seq 300); do [[ -d /proc/\$(</run/$1.pid) ]] || exit 0; sleep 0.1; done; exit 1"
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
said=$(host a 'tail -n 1 /run/a.out')
[[ $said == *'pvh is protected no longer; it runs on'* ]] || die "it says: $said"
echo "ok: $said"
holds "the dirty log is off" is_not_logged
holds "the guest runs on" is_running pvh
holds "nobody has taken over" wait_until 20 is_clean
holds "nothing says that it is protected" host a '[[ ! -e /run/disks/a.img.colo-protected ]]'
host a 'xl destroy pvh'
host b 'xl-colo stop'
