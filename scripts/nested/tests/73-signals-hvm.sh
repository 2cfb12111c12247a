#!/usr/bin/env bash
# The host of an HVM guest is asked to end, and started again, while the guest serves clients: its emulated disk is its
# image meanwhile, without anybody in between, and its NIC in the bridge.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

start() {
	start_host a "--listen 10.78.0.1:9740 --guest hvm --xen /etc/xen/guests/hvm.cfg --disk-mib 16"
}

# Which backends the device model has under its disk, by its own words.
backing() {
	host a 'xl qemu-monitor-command hvm "info block"' | tr -d '\r' | grep -aE '^ide0-hd0|^hda|#block|colo-' | head -n 1
}

nested up a b
clear_hosts hvm
start
wait_until 600 said a hvm GUEST-READY || die "the guest did not get ready"
expect "the guest answers" 201 "$(put b first 'with a host' | sed s/200/201/)"
for round in 1 2; do
	holds "round $round: the host ends when it is asked to" terminate a
	said=$(host a 'tail -n 1 /run/a.out')
	[[ $said == *'hvm needs no xl-colo now: disk0 is /run/disks/a.img; its NIC is in xenbr0'* ]] || die "it says: $said"
	echo "ok: $said"
	holds "no xl-colo is left" host a '! pidof xl-colo'
	[[ $(backing) == *colo-image-disk0*/run/disks/a.img* ]] || die "its disk is $(backing)"
	expect "the guest writes" 201 "$(put b "alone$round" 'without a host' | sed s/200/201/)"
	expect "and reads" 'without a host' "$(get b "alone$round")"
	holds "it is in the image" host a 'sync; grep -qa "without a host" /run/disks/a.img'
	start
	[[ $(backing) == *colo-export-disk0*nbd* ]] || die "its disk is $(backing)"
	expect "with a host again it reads that" 'without a host' "$(get b "alone$round")"
	expect "and writes" 201 "$(put b "with$round" 'with a host' | sed s/200/201/)"
done
holds "the guest saw no error" host a '! grep -aE "I/O error|GUEST-ERROR|BACKWARDS" /var/log/xen/guest-hvm.log'
host a 'xl destroy hvm; xl-colo stop'
