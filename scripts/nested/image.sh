#!/usr/bin/env bash
# Builds what two nested Xen hosts boot, from Debian's packages and the machine's own package sources:
#
#   xen.elf      the hypervisor; QEMU's -kernel takes the uncompressed multiboot ELF
#   vmlinux      the kernel of dom0, as ELF: under emulation its XZ image costs 3 s more
#   dom0.cpio    dom0's whole system: xl, the device model, what the tests use, kernels for guests
#   guest.cpio.gz  the guests' whole system, with the service of guest/tool.rs (goes to the share)
#
# Only what changed is built again. Nothing of the project is in dom0.cpio: dom0 takes xl-colo, the hotplug scripts
# and the guests from the share when it boots.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly BUILD=$DIR/build
readonly PACKAGES=xen-utils-4.17,xen-hypervisor-4.17-amd64,xenstore-utils,libxenmisc4.17,busybox-static,bash,grep,sed,coreutils,mount,iproute2,socat,kmod,strace,util-linux,qemu-system-xen,bridge-utils,tcpdump,ethtool,nbdkit,curl,iputils-ping,procps,linux-image-amd64

# Programs of dom0 besides busybox; the first field of each line is where they lie in the package root.
readonly DOM0_PROGRAMS=(
	usr/bin/{bash,grep,sed,socat,kmod,strace,date,dd,stat,flock,timeout,tcpdump,curl,ping,xenstore,nbdkit,sha256sum,nproc,ps}
	usr/bin/xenstore-{ls,read,write,list,rm,exists,watch,chmod}
	usr/sbin/{ip,tc,bridge,brctl,losetup,ethtool}
	usr/lib/xen-4.17/bin/{xl,xenstored,xenconsoled,xenconsole,xen-init-dom0,libxl-save-helper,xenctx,xen-hvmctx,xentop}
	usr/lib/xen-4.17/bin/{xen-diag,lsevtchn,xenstore-control}
	usr/libexec/xen-qemu-system-i386
)
# Libraries no program of dom0 names: Xen's, for xl-colo, and one that pthread_cancel opens by name.
readonly DOM0_LIBRARIES=(libgcc_s.so.1 libnss_files.so.2 'libxen*.so.*' 'libxl*.so.*')
readonly DOM0_FILES=(
	etc/xen usr/lib/xen-common usr/lib/xen-4.17/boot
	usr/share/qemu/{keymaps,linuxboot_dma.bin,linuxboot.bin,kvmvapic.bin}
	usr/share/seabios/bios-256k.bin
	usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-{file,memory}-plugin.so
	usr/lib/x86_64-linux-gnu/nbdkit/filters/nbdkit-{delay,error,log}-filter.so
)
readonly DOM0_MODULES=(xenfs xen-privcmd xen-evtchn xen-gntdev xen-gntalloc xen-netback xen-blkback loop tun bridge
	virtio_pci virtio_net 9p 9pnet_virtio nbd veth sch_ingress cls_matchall act_mirred sch_netem sch_plug ifb)
readonly GUEST_MODULES=(xen-netfront xen-blkfront e1000 ata_piix sd_mod)

ROOTFS=$BUILD/root

# kernel_version: the version whose modules lie in the package root.
kernel_version() {
	local modules=("$ROOTFS"/usr/lib/modules/* "$ROOTFS"/lib/modules/*)
	local path
	for path in "${modules[@]}"; do
		[[ -d $path/kernel ]] && basename "$path" && return 0
	done
	die "no kernel modules in $ROOTFS"
}

build_root() {
	local wanted
	wanted=$(sha256sum <<<"$PACKAGES")
	stale "$BUILD/root.stamp" "$wanted" || return 0
	[[ $(id -u) -eq 0 ]] || skip "images are built by root only, and there is none in $DIR"
	say "fetching packages"
	rm -rf "$ROOTFS" "$BUILD/root.stamp"
	# Unpacked only: no maintainer script runs. Without a source named, mmdebstrap takes the machine's own.
	local sources=(/etc/apt/sources.list /etc/apt/sources.list.d/debian.sources) found=() file
	for file in "${sources[@]}"; do
		[[ -s $file ]] && found+=("$file")
	done
	mmdebstrap --variant=extract --mode=root --include="$PACKAGES" bookworm "$ROOTFS" "${found[@]}" \
		>"$BUILD/mmdebstrap.log" 2>&1 || skip "mmdebstrap failed, see $BUILD/mmdebstrap.log"
	depmod -b "$ROOTFS" "$(kernel_version)"
	echo "$wanted" >"$BUILD/root.stamp"
}

# A bzImage holds its ELF compressed, at an offset the setup header says (Linux Documentation/arch/x86/boot.rst:
# setup_sects at 0x1f1, payload_offset at 0x248, payload_length at 0x24c).
extract_vmlinux() {
	local bzimage=$1 out=$2 sectors offset length
	sectors=$(od -An -tu1 -j$((0x1f1)) -N1 "$bzimage")
	read -r offset length < <(od -An -tu4 -j$((0x248)) -N8 "$bzimage")
	[[ $sectors -gt 0 ]] || sectors=4
	# The payload's last four bytes are the ELF's size, and no part of the XZ file.
	dd if="$bzimage" bs=1M iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + offset)) count=$((length - 4)) \
		status=none | xz -dc >"$out.new"
	[[ $(head -c 4 "$out.new") == $'\x7fELF' ]] || die "no ELF in $bzimage"
	mv "$out.new" "$out"
}

build_kernels() {
	local wanted version
	wanted=$(digest "$BUILD/root.stamp")
	stale "$BUILD/kernels.stamp" "$wanted" || return 0
	say "unpacking the hypervisor and the kernel"
	version=$(kernel_version)
	zcat "$ROOTFS"/boot/xen-4.17-amd64.gz >"$DIR/xen.elf"
	cp "$ROOTFS/boot/vmlinuz-$version" "$DIR/vmlinuz"
	extract_vmlinux "$DIR/vmlinuz" "$DIR/vmlinux"
	echo "$wanted" >"$BUILD/kernels.stamp"
}

# in_root PATH: the file in the package root, whichever way /usr is merged there.
in_root() {
	local path
	for path in "$ROOTFS/$1" "$ROOTFS/${1#usr/}"; do
		[[ -e $path ]] && echo "$path" && return 0
	done
	die "no /$1 in the package root"
}

# copy_modules INTO MODULE...: with what they depend on.
copy_modules() {
	local into=$1 version file module
	shift
	version=$(kernel_version)
	for module in "$@"; do
		modprobe -d "$ROOTFS" -S "$version" --show-depends "$module" || die "no kernel module $module"
	done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r file; do
		file=${file#"$ROOTFS/"}
		install -D -m644 "$ROOTFS/$file" "$into/usr/${file#usr/}"
	done
	cp "$ROOTFS/lib/modules/$version/modules".{order,builtin,builtin.modinfo} "$into/usr/lib/modules/$version/"
	depmod -b "$into" "$version"
}

# skeleton INTO: folders, merged /usr, device nodes, busybox.
skeleton() {
	local into=$1 link applet
	rm -rf "$into"
	mkdir -p "$into"/{usr/{bin,sbin,lib,lib64},proc,sys,dev,run,tmp,root,lab,etc,var/log/xen,var/lib/xen/dump,boot}
	for link in bin sbin lib lib64; do ln -s "usr/$link" "$into/$link"; done
	ln -s /run "$into/var/run"
	ln -s /run "$into/var/lock"
	mknod "$into/dev/console" c 5 1
	mknod "$into/dev/null" c 1 3
	cp "$(in_root usr/bin/busybox)" "$into/usr/bin/busybox"
	for applet in $("$into/usr/bin/busybox" --list); do
		# Its list has itself in it.
		[[ $applet == busybox ]] || ln -s busybox "$into/usr/bin/$applet"
	done
	echo 'root:x:0:0:root:/root:/bin/sh' >"$into/etc/passwd"
	echo 'root:x:0:' >"$into/etc/group"
	: >"$into/etc/fstab"
}

pack() {
	(cd "$1" && find . -print0 | sort -z | cpio --null -o -H newc --quiet) >"$2.new"
	mv "$2.new" "$2"
}

# The libraries that programs in the package root load, as paths in it.
libraries_of() {
	local program pattern library
	{
		for program in "$@"; do
			chroot "$ROOTFS" /lib64/ld-linux-x86-64.so.2 --list "${program#"$ROOTFS"}" 2>/dev/null || true
		done | grep -oE '/[^ ]+\.so[^ ]*'
		for pattern in "${DOM0_LIBRARIES[@]}"; do
			for library in "$ROOTFS"/{,usr/}lib/x86_64-linux-gnu/$pattern; do
				[[ -e $library ]] && echo "${library#"$ROOTFS"}"
			done
		done
	} | sort -u
}

build_dom0() {
	local wanted into=$BUILD/dom0 path source real=() version
	wanted=$(digest "$BUILD/kernels.stamp" "$NESTED/image.sh" "$NESTED"/dom0/*)
	stale "$BUILD/dom0.stamp" "$wanted" || return 0
	say "packing dom0"
	skeleton "$into"
	for path in "${DOM0_PROGRAMS[@]}"; do
		source=$(in_root "$path")
		install -D -m755 --remove-destination "$source" "$into/$path" 2>/dev/null ||
			{ rm -f "$into/$path" && install -D -m755 "$source" "$into/$path"; }
		real+=("$source")
	done
	for path in "${DOM0_FILES[@]}"; do
		source=$(in_root "$path")
		mkdir -p "$into/$(dirname "$path")"
		cp -rL "$source" "$into/$(dirname "$path")/"
		[[ $path == *.so ]] && real+=("$source")
	done
	libraries_of "${real[@]}" | while read -r path; do
		path=${path#/}
		install -D -m755 "$ROOTFS/$path" "$into/usr/${path#usr/}"
	done
	for path in modprobe insmod lsmod; do ln -sfn kmod "$into/usr/bin/$path"; done
	# The kernel calls modprobe by this name.
	ln -sfn ../bin/kmod "$into/usr/sbin/modprobe"
	ln -sfn bash "$into/usr/bin/sh"
	copy_modules "$into" "${DOM0_MODULES[@]}"
	version=$(kernel_version)
	cp "$DIR/vmlinux" "$DIR/vmlinuz" "$into/boot/"
	install -m755 "$NESTED/dom0/init" "$into/init"
	install -m755 "$NESTED"/dom0/lab-* "$into/usr/sbin/"
	pack "$into" "$DIR/dom0.cpio"
	say "dom0 has $(du -sh "$into" | cut -f1), Linux $version"
	echo "$wanted" >"$BUILD/dom0.stamp"
}

build_guest() {
	local wanted into=$BUILD/guest
	wanted=$(digest "$BUILD/kernels.stamp" "$NESTED/image.sh" "$NESTED"/guest/*)
	stale "$BUILD/guest.stamp" "$wanted" || return 0
	command -v rustc >/dev/null || skip "no rustc to compile the guest's service"
	say "packing the guest"
	# Static: the guest has no libraries at all.
	rustc --edition 2024 -O -C target-feature=+crt-static -C panic=abort -C strip=symbols -D warnings \
		-o "$BUILD/guest-tool" "$NESTED/guest/tool.rs"
	skeleton "$into"
	install -m755 "$BUILD/guest-tool" "$into/usr/bin/guest-tool"
	install -m755 "$NESTED/guest/init" "$into/init"
	copy_modules "$into" "${GUEST_MODULES[@]}"
	mkdir -p "$SHARE"
	pack "$into" "$BUILD/guest.cpio"
	# Small: an HVM guest's boot ROM reads it byte by byte, each of them through the device model.
	gzip -9nc "$BUILD/guest.cpio" >"$SHARE/guest.cpio.gz.new"
	mv "$SHARE/guest.cpio.gz.new" "$SHARE/guest.cpio.gz"
	echo "$wanted" >"$BUILD/guest.stamp"
}

main() {
	install_packages
	mkdir -p "$BUILD" "$SHARE"
	# Two builds at once would tread on each other.
	exec 9>"$BUILD/lock"
	flock -w 300 9 || die "another build has held $BUILD/lock for 5 minutes"
	build_root
	build_kernels
	build_dom0
	build_guest
}

main "$@"
