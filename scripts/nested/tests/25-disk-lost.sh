#!/usr/bin/env bash
# The disk's server dies: the guest is told so at once and nothing hangs; created anew, it has what it had written.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

nested up a b
host a 'xl destroy pvh 2>/dev/null; rm -f /run/disks/pvh; true'
serve_disk a pvh
start_guest a pvh vif
expect "a write succeeds" 201 "$(put b before 'written before')"
unserve_disk a pvh
expect "without its server the disk takes no write" 500 \
	"$(host b "curl -sS --max-time 30 -o /dev/null -w '%{http_code}' -X PUT --data-binary x $GUEST_URL/k/between")"
holds "the guest ends within its time" host a 'timeout 60 xl destroy pvh'
holds "the nbd device is free again" wait_until 20 host a '[[ ! -e /sys/block/nbd0/pid ]]'
serve_disk a pvh
start_guest a pvh vif
expect "what was written before is there" 'written before' "$(get b before)"
expect "and a write succeeds again" 201 "$(put b after 'written after')"
host a 'xl destroy pvh'
unserve_disk a pvh
