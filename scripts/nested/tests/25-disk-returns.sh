#!/usr/bin/env bash
# The disk's server ends and another one takes its socket: the guest's disk works again without anybody's help.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

writes() {
	[[ $(put a "$1" "$2") == 20[01] ]]
}

nested up a
host a 'xl destroy pvh 2>/dev/null; rm -f /run/disks/pvh; true'
serve_disk a pvh
start_guest a pvh vif
holds "a write succeeds" writes before 'written before'
unserve_disk a pvh
expect "without its server the disk takes no write" 500 \
	"$(host a "curl -sS --max-time 60 -o /dev/null -w '%{http_code}' -X PUT --data-binary x $GUEST_URL/k/between")"
serve_disk a pvh
holds "a write succeeds again" wait_until 60 writes after 'written after'
expect "what was written before is there" 'written before' "$(get a before)"
holds "and what was written after is on the disk" host a "grep -qa 'written after' /run/disks/pvh"
host a 'xl destroy pvh'
holds "the nbd device is free again" wait_until 20 host a '[[ ! -e /sys/block/nbd0/pid ]]'
unserve_disk a pvh
