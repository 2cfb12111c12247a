#!/usr/bin/env bash
# An HVM guest without PV drivers, its disk an NBD export that its device model opens, its NIC a tap, serves another host.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

nested up a b
host a 'xl destroy hvm 2>/dev/null; rm -f /run/disks/hvm; true'
serve_disk a hvm
start_guest a hvm tap
domid=$(host a 'xl domid hvm')
holds "it found the emulated disk" said a hvm 'GUEST-UP .*disk=/dev/sda'
expect "a key is created" 201 "$(put b first 'a value of the emulated disk')"
expect "and read" 'a value of the emulated disk' "$(get b first)"
holds "it is on the disk" host a "grep -qa 'a value of the emulated disk' /run/disks/hvm"
check_registers a hvm
holds "nothing went wrong on the console" host a "! grep -aE 'GUEST-[A-Z]* ERROR|BACKWARDS|GUEST-FAILED' /var/log/xen/guest-hvm.log"
host a 'xl destroy hvm'
holds "its veth is gone with it" wait_until 20 host a "[[ ! -e /sys/class/net/cb$domid.0 ]]"
unserve_disk a hvm
