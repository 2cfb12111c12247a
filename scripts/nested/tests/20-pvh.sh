#!/usr/bin/env bash
# A PVH guest whose disk and NIC go through the hotplug scripts serves clients of another host, from its disk.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

nested up a b
host a 'xl destroy pvh 2>/dev/null; rm -f /run/disks/pvh; true'
serve_disk a pvh
start_guest a pvh vif
domid=$(host a 'xl domid pvh')

expect "a new key is created" 201 "$(put b first 'a value of the first run')"
expect "the key is replaced" 200 "$(put b first 'another value of the first run')"
expect "the value is what was written last" 'another value of the first run' "$(get b first)"
holds "it is on the disk" host a "grep -qa 'another value of the first run' /run/disks/pvh"
one=$(host b "curl -sSi --max-time 30 $GUEST_URL/k/first | sha256sum")
expect "the same request has the same answer" "$one" "$(host b "curl -sSi --max-time 30 $GUEST_URL/k/first | sha256sum")"
expect "an unknown key is not found" 404 \
	"$(host b "curl -sS --max-time 30 -o /dev/null -w '%{http_code}' $GUEST_URL/k/unknown")"

# What the answer proves: with its disk gone wrong behind its back, the guest cannot answer from memory.
host a "printf 'XX' | dd of=/run/disks/pvh bs=1 seek=\$(grep -abo 'another value' /run/disks/pvh | head -1 | cut -d: -f1) conv=notrunc status=none"
expect "a value that changed on the disk is noticed" 500 \
	"$(host b "curl -sS --max-time 30 -o /dev/null -w '%{http_code}' $GUEST_URL/k/first")"
expect "the next key is created" 201 "$(put b second 'a second value')"

holds "the guest's NIC is in no bridge of the network" host a "! bridge link | grep -q 'vif$domid.0.*master xenbr0'"
expect "the guest does not send what must be cut up" '0 0' \
	"$(host a "xenstore-read /local/domain/0/backend/vif/$domid/0/feature-gso-tcpv4 /local/domain/0/backend/vif/$domid/0/feature-gso-tcpv6 | xargs")"
check_registers a pvh
holds "the clock ticks" said a pvh 'GUEST-TICK'
holds "nothing went wrong on the console" host a "! grep -aE 'GUEST-[A-Z]* ERROR|BACKWARDS|GUEST-FAILED' /var/log/xen/guest-pvh.log"

host a 'xl destroy pvh'
holds "its veth is gone with it" wait_until 20 host a "[[ ! -e /sys/class/net/cb$domid.0 ]]"
holds "its nbd device is free again" wait_until 20 host a '[[ ! -e /sys/block/nbd0/pid ]]'
start_guest a pvh vif
holds "the log was read up to the damaged record" said a pvh 'GUEST-READY port=80 names=1'
expect "the value before it is there" 'a value of the first run' "$(get b first)"
host a 'xl destroy pvh'
unserve_disk a pvh
