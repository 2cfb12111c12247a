#!/usr/bin/env bash
# The disk's server dies: the guest's writes wait and go on at the next server, and none is lost. A guest that is
# destroyed meanwhile does not wait, and one that nobody serves for too long is told so.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

readonly KILLS=5

# serve_again: a new server, and its connection for the device that has none.
serve_again() {
	serve_disk a pvh
	host a 'xl-colo nbd-device reconnect pvh/disk0 --socket /run/xen-colo/pvh.disk0.sock --export disk0'
}

nested up a b
host a 'xl destroy pvh 2>/dev/null; rm -f /run/disks/pvh; true'
serve_disk a pvh
start_guest a pvh vif
expect "a write succeeds" 201 "$(put b before 'written before')"

unserve_disk a pvh
host b "rm -f /run/between; curl -sS --max-time 300 -o /dev/null -w '%{http_code}' -X PUT --data-binary 'written between' \
	$GUEST_URL/k/between </dev/null >/run/between 2>&1 &"
sleep 5
holds "without its server a write has no answer" host b '[[ ! -s /run/between ]]'
expect "it is no other guest's server that it goes on with" '' \
	"$(host a 'xl-colo nbd-device reconnect other/disk0 --socket /run/xen-colo/pvh.disk0.sock --export disk0')"
expect "the device goes on" /dev/nbd0 "$(serve_again)"
holds "and so does the write" wait_until 60 host b '[[ $(</run/between) == 201 ]]'

start_writer b
for ((kill = 1; kill <= KILLS; kill++)); do
	wait_until 120 has_acked b $((kill * 5)) || die "only $(acked b) writes were answered"
	unserve_disk a pvh
	serve_again >/dev/null
done
wait_until 120 has_acked b $((KILLS * 5 + 5)) || die "only $(acked b) writes were answered"
check_writer b
expect "what was written before is there" 'written before' "$(get b before)"
expect "and what was written between" 'written between' "$(get b between)"
holds "the guest saw no error" host a '! grep -aE "I/O error|GUEST-ERROR" /var/log/xen/guest-pvh.log'

unserve_disk a pvh
host b "curl -sS --max-time 120 -o /dev/null -X PUT --data-binary x $GUEST_URL/k/last </dev/null >/dev/null 2>&1 &"
sleep 3
holds "a guest that waits for its disk ends within its time" host a 'timeout 60 xl destroy pvh'
holds "the nbd device is free again" wait_until 20 host a '[[ ! -e /sys/block/nbd0/pid ]]'

serve_disk a pvh
NBD_DEAD_SECONDS=5 start_guest a pvh vif
unserve_disk a pvh
expect "a server that does not come back within its time is an error" 500 \
	"$(host b "curl -sS --max-time 60 -o /dev/null -w '%{http_code}' -X PUT --data-binary x $GUEST_URL/k/late")"
host a 'timeout 60 xl destroy pvh'
holds "the nbd device is free again" wait_until 20 host a '[[ ! -e /sys/block/nbd0/pid ]]'
