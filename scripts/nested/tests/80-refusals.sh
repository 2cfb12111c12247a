#!/usr/bin/env bash
# What cannot be protected says so, in `xl-colo check --guest` and in `xl-colo protect`, and is left as it was: its dirty
# log off, running, and xl's to work on. Then a protection that is ended (`xl-colo unprotect`), begun again, and needed.
#
# That a guest with PV drivers is refused in COLO mode is in 70-protect.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

export RUN_SECONDS=240

# A guest with nothing but memory and a processor, and what is added to it.
readonly BARE='kernel = "/boot/vmlinux"
ramdisk = "/boot/guest.cpio.gz"
extra = "console=hvc0 quiet loglevel=4 mitigations=off guest.ip=10.77.0.2/24 guest.port=80"
memory = 128
maxmem = 128
on_poweroff = "preserve"
on_crash = "preserve"'

# configure NAME LINES: its configuration in dom0 of a.
configure() {
	host a "cat >/run/$1.cfg <<-END
		name = \"$1\"
		$BARE
		$2
	END"
}

# guest NAME LINES: made by xl-colo, as its own.
guest() {
	configure "$1" "$2"
	start_host a "--listen 10.78.0.1:9740 --guest $1 --xen /run/$1.cfg --disk-mib 1"
}

gone() {
	host a "xl-colo stop; xl destroy $1"
}

# refused WHAT GUEST TEXT...: `check` and `protect` both say each TEXT, and nothing is left behind.
refused() {
	local what=$1 guest=$2 said text
	shift 2
	said=$(host a "xl-colo check --guest $guest" || true)
	for text in "$@"; do
		grep -q "^not  guest $guest .*$text.*; do: " <<<"$said" || die "$what: check does not say \"$text\": $said"
	done
	said=$(host a 'xl-colo protect 10.78.0.2:9740 --mode remus --wait' 2>&1 || true)
	for text in "$@"; do
		[[ $said == *"$text"* ]] || die "$what: not refused, or not for \"$text\": $said"
	done
	echo "ok: $what is refused: $said"
	holds "$what: the dirty log is off" is_not_logged
}

# as_it_was GUEST: it runs, and xl works.
as_it_was() {
	holds "$1 runs" is_running "$1"
	holds "xl pauses and unpauses $1" host a "xl pause $1 && xl unpause $1"
}

nested up a b
host a 'losetup -d /dev/loop7 2>/dev/null; true'
clear_hosts plain two nodes pv shadowed pvh
start_host b "--listen 10.78.0.2:9740"

checked=$(host a 'xl-colo check 10.78.0.2:9740') || die "host a is not able: $checked"
echo "$checked"
holds "both hosts are able" host b 'xl-colo check 10.78.0.2:9740 >/dev/null'

guest plain 'type = "pvh"
		vcpus = 1'
wait_until 200 said a plain GUEST-TICK || die "plain does not get up: $(nested console a plain | tail -n 5)"
holds "nothing is in the way of a plain guest" host a 'xl-colo check --guest plain | grep -q "^ok   guest plain"'

# Paused, it cannot follow its balloon's target, which moves at once where the guest does.
host a 'xl pause plain && xl mem-set plain 96'
refused "a balloon on the move" plain "its balloon is on the move"
host a 'xl unpause plain'
able() { host a 'xl-colo check --guest plain | grep -q "^ok   guest plain"'; }
holds "it reaches its target, and is in nobody's way" wait_until 60 able
host a 'xl mem-set plain 128'
holds "and back" wait_until 60 able
as_it_was plain

# The lab's processor has no IOMMU, so nothing can be passed through: only what xl would have written is there.
host a 'pci=/local/domain/0/backend/pci/$(xl domid plain)/0; xenstore-write $pci/num_devs 1 $pci/dev-0 0000:00:05.0 \
	$pci/vdevfn-0 28 $pci/state-0 3 $pci/opts-0 msitranslate=0,power_mgmt=0,permissive=0'
refused "a guest with a device passed through" plain "1 device(s) are passed through to it"
host a 'xenstore-rm /local/domain/0/backend/pci/$(xl domid plain)'
as_it_was plain

# As `xl save` would ask it to; nobody resumes it.
host a 'xenstore-write /local/domain/$(xl domid plain)/control/shutdown suspend'
suspended() { host a '[[ $(xl list plain | awk "NR == 2 { print \$5 }") == *s* ]]'; }
wait_until 60 suspended || die "plain did not suspend: $(host a 'xl list')"
refused "a suspended guest" plain "it has shut down (reason 2)"
gone plain

host a 'truncate -s 16M /run/disks/foreign && losetup /dev/loop7 /run/disks/foreign'
guest two 'type = "pvh"
		vcpus = 1
		disk = ["format=raw,vdev=xvda,access=rw,script=block-colo,target=two/disk0",
			"format=raw,vdev=xvdb,access=rw,backendtype=phy,target=/dev/loop7"]
		vif = ["mac=02:10:77:00:00:02,bridge=xenbr0,script=vif-colo", "mac=02:10:77:00:00:03,bridge=xenbr0,script=vif-colo"]'
refused "a guest with a disk and a NIC too many" two "writes to xvdb" "it has 2 NICs"
as_it_was two
gone two
host a 'losetup -d /dev/loop7'

# libxl 4.17 makes no PVH guest and no PV guest with them. The lab's processor has one core, hence maxvcpus.
guest nodes 'type = "hvm"
		device_model_version = "qemu-xen"
		device_model_override = "/usr/libexec/xen-qemu-system-i386"
		kernel = "/boot/vmlinuz"
		vga = "none"
		nographic = 1
		vcpus = 1
		maxvcpus = 2
		vnuma = [["pnode=0", "size=64", "vcpus=0", "vdistances=10,20"],
			["pnode=0", "size=64", "vcpus=1", "vdistances=20,10"]]'
refused "a guest with two NUMA nodes" nodes "several virtual NUMA nodes"
as_it_was nodes
gone nodes

guest pv 'type = "pv"
		vcpus = 1'
refused "a PV guest" pv "it is a PV guest, and this hypervisor has no shadow paging"
as_it_was pv
gone pv

configure shadowed 'type = "pvh"
		vcpus = 1
		hap = 0'
if said=$(host a 'xl create -q /run/shadowed.cfg' 2>&1); then
	host a 'xl destroy shadowed'
	guest shadowed 'type = "pvh"
		vcpus = 1
		hap = 0'
	refused "a guest without HAP" shadowed "no hardware-assisted paging"
	gone shadowed
else
	echo "SKIP: a guest without HAP: this Xen cannot make one: $(head -n 1 <<<"$said")"
	host a 'xl destroy shadowed 2>/dev/null; true'
fi

# Protected, let go, protected again, and then it is needed.
start_host a "--listen 10.78.0.1:9740 --guest pvh --xen /etc/xen/guests/pvh.cfg --disk-mib 16"
wait_until 200 said a pvh GUEST-READY || die "pvh did not get ready"
protect() {
	host a "xl-colo protect 10.78.0.2:9740 --mode remus --checkpoint-delay-ms 500 $PATIENT --wait"
}
for round in first second; do
	protect
	holds "$round protection: the dirty log is on" is_logged
	expect "$round protection: a write is answered" 201 "$(put a "$round" "while protected")"
	holds "$round protection: b stands by" host b 'xl list pvh--incoming >/dev/null'
	begun=$EPOCHREALTIME
	host a 'xl-colo unprotect'
	awk -v a="$begun" -v b="$EPOCHREALTIME" 'BEGIN { printf "figure: unprotect %.2f s\n", b - a }'
	holds "$round protection ended: the dirty log is off" is_not_logged
	holds "status says so" host a 'xl-colo status | grep -q "because     the protection was ended"'
	expect "a write is answered" 201 "$(put a "$round-alone" "while alone")"
	empty() { host b 'xl-colo status | grep -q "guest       none"'; }
	holds "b is free" wait_until 60 empty
	holds "b has no domain of it" host b '! xl list pvh--incoming >/dev/null 2>&1 && ! xl list pvh >/dev/null 2>&1'
	as_it_was pvh
done
refused=$(host b 'xl-colo unprotect' 2>&1 || true)
[[ $refused == *"nothing is protected from this host"* ]] || die "b unprotects: $refused"
protect
refused=$(host b 'xl-colo unprotect' 2>&1 || true)
[[ $refused == *"stands by for host a; end the protection there"* ]] || die "b unprotects: $refused"
echo "ok: refused on b: $refused"
expect "a write is answered" 201 "$(put a last "before the power cut")"
nested kill a
taken_over() { host b 'xl-colo status | grep -q "taken over"'; }
holds "b takes over" wait_until 120 taken_over
served() { [[ $(get b last) == "before the power cut" ]]; }
holds "the last write is there" wait_until 60 served
expect "and one from between two protections" "while alone" "$(get b first-alone)"
host b 'xl-colo stop; xl destroy pvh'
