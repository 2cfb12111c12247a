#!/usr/bin/env bash
# A PVH guest with two disks, both ours, and a service on each: a host with too few images is refused, then the guest is
# protected and its host loses its power. Both disks go on with all that was written, and say so in their images.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

export RUN_SECONDS=240

readonly SECOND='--disk /run/disks/second.img'
readonly GUEST='name = "two"
type = "pvh"
hap = 1
memory = 128
maxmem = 128
vcpus = 1
kernel = "/boot/vmlinux"
ramdisk = "/boot/guest.cpio.gz"
extra = "console=hvc0 quiet loglevel=4 mitigations=off guest.ip=10.77.0.2/24 guest.port=80 guest.second=xvdb guest.registers=0"
vif = ["mac=02:10:77:00:00:02,bridge=xenbr0,script=vif-colo"]
disk = ["format=raw,vdev=xvda,access=rw,script=block-colo,target=two/disk0",
	"format=raw,vdev=xvdb,access=rw,script=block-colo,target=two/disk1"]
on_poweroff = "destroy"
on_crash = "preserve"'

# put2 HOST KEY VALUE, get2 HOST KEY: the same as put and get, on the service of the second disk.
put2() {
	host "$1" "curl -sS --fail --max-time 30 -o /dev/null -w '%{http_code}' -X PUT --data-binary '$3' $GUEST_URL:81/k/$2"
}

get2() {
	host "$1" "curl -sS --fail --max-time 30 $GUEST_URL:81/k/$2"
}

nested up a b
clear_hosts two
host a "cat >/run/two.cfg <<-'END'
$GUEST
END"

refused=$(host a 'xl create -q /run/two.cfg 2>&1; xl destroy two 2>/dev/null; true')
[[ $refused == *"does not serve /run/xen-colo/two.disk0.sock"* ]] || die "a guest without its disks: $refused"

start_host b '--listen 10.78.0.2:9740'
start_host a "$SECOND --listen 10.78.0.1:9740 --guest two --xen /run/two.cfg --disk-mib 16"
wait_until 200 said a two 'GUEST-READY port=80' || die "the first service: $(nested console a two | tail -n 5)"
wait_until 60 said a two 'GUEST-READY port=81' || die "the second service: $(nested console a two | tail -n 5)"
holds "each disk has an nbd device" host a '[[ -e /sys/block/nbd0/pid && -e /sys/block/nbd1/pid ]]'
holds "nothing is in the way of it" host a 'xl-colo check --guest two | grep -q "^ok   guest two"'

refused=$(host a 'xl-colo protect 10.78.0.2:9740 --mode remus --wait' 2>&1 || true)
[[ $refused == *"the guest has 2 disk(s), and this host was given 1 image(s)"* ]] || die "one image: $refused"
echo "ok: refused: $refused"
holds "the dirty log is off after a refusal" is_not_logged
host b 'xl-colo stop; rm -f /run/disks/*'
start_host b "$SECOND --listen 10.78.0.2:9740"

expect "a key of the first disk" 201 "$(put a first 'before, on the first')"
expect "a key of the second disk" 201 "$(put2 a second 'before, on the second')"
host a "xl-colo protect 10.78.0.2:9740 --mode remus --checkpoint-delay-ms 500 $PATIENT --wait"
holds "the dirty log is on" is_logged
holds "status names both disks" host a 'xl-colo status | grep -q "^disk0 " && xl-colo status | grep -q "^disk1 "'
for n in 1 2 3; do
	expect "first disk, write $n while protected" 201 "$(put a "first-$n" "protected $n, on the first")"
	expect "second disk, write $n while protected" 201 "$(put2 a "second-$n" "protected $n, on the second")"
done

nested kill a
taken_over() { host b 'xl-colo status | grep -q "taken over"'; }
holds "b takes over" wait_until 120 taken_over
served() { [[ $(get b first-3) == "protected 3, on the first" ]]; }
holds "the first disk's last write is there" wait_until 60 served
expect "the second disk's too" 'protected 3, on the second' "$(get2 b second-3)"
expect "the first disk has what was written before" 'before, on the first' "$(get b first)"
expect "the second disk has what was written before" 'before, on the second' "$(get2 b second)"
expect "the first disk takes writes" 201 "$(put b after 'after, on the first')"
expect "the second disk takes writes" 201 "$(put2 b after 'after, on the second')"
merged() { host b '[[ $(xl-colo status | grep -c "image whole: a guest.s own disk") == 2 ]]'; }
holds "both images are the guest's own" wait_until 60 merged
holds "the first image has it all" host b 'grep -qa "protected 3, on the first" /run/disks/b.img && grep -qa "after, on the first" /run/disks/b.img'
holds "the second image has it all" host b 'grep -qa "protected 3, on the second" /run/disks/second.img && grep -qa "after, on the second" /run/disks/second.img'
host b 'xl-colo stop; xl destroy two'
