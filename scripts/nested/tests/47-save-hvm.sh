#!/usr/bin/env bash
# xl with our engine under it, and an HVM guest: its device model's state and its parameters travel too. One with PV
# drivers, which suspends itself, and one without, which is stopped where it is.
# shellcheck source-path=SCRIPTDIR source=../engines.sh
. "$(dirname "${BASH_SOURCE[0]}")/../engines.sh"

# configuration PLATFORM WORDS: with the platform device or not, and with more words for the guest's kernel.
configuration() {
	cat <<END
name = "plain"
type = "hvm"
hap = 1
memory = 128
maxmem = 128
vcpus = 1
xen_platform_pci = $1
kernel = "/boot/vmlinuz"
ramdisk = "/boot/guest.cpio.gz"
extra = "console=ttyS0 quiet loglevel=4 mitigations=off guest.ip=10.77.0.2/24 $2"
device_model_version = "qemu-xen"
device_model_override = "/usr/libexec/xen-qemu-system-i386"
serial = "file:/var/log/xen/guest-plain.log"
vga = "none"
nographic = 1
usb = 0
on_crash = "preserve"
END
}

nested up a
for platform in 0 1; do
	words=xen_nopv
	[[ $platform == 0 ]] || words=
	start_plain "$(configuration $platform "$words")"
	save_and_restore stock ours
	save_and_restore ours stock
	save_and_restore ours ours
	migrate ours ours
	migrate ours stock
	migrate stock ours
	host a 'xl destroy plain'
done
