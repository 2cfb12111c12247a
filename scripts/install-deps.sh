#!/usr/bin/env bash
# Installs what the tests drive besides Rust, on Debian and its kin: other people's NBD programs, curl, a browser, and what packs and
# judges a package or judges metrics.
# Without root or apt-get it says what is missing and goes on: the tests concerned say so too.
set -euo pipefail

# Each command, and the package it comes from.
readonly TOOLS=(cc:gcc curl:curl qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils
	qemu-system-x86_64:qemu-system-x86 socat:socat fio:fio ip:iproute2 ping:iputils-ping iperf3:iperf3 chromium:chromium python3:python3 nbdsh:python3-libnbd nbdkit:nbdkit nbd-server:nbd-server nbdinfo:libnbd-bin nbdcopy:libnbd-bin shellcheck:shellcheck
	systemd-analyze:systemd ocf-tester:resource-agents xmllint:libxml2-utils setpriv:util-linux losetup:mount mkfs.ext4:e2fsprogs mmdebstrap:mmdebstrap dpkg-shlibdeps:dpkg-dev)

# What package xen is built against: each file, and its package. The libraries and headers of the Xen that is
# installed, and what bindgen reads them with.
readonly FILES=(/usr/include/xenctrl.h:libxen-dev /usr/lib/llvm-*/lib/libclang.so*:libclang-dev)

missing_packages() {
	local tool file
	for file in "${FILES[@]}"; do
		# The pattern is one on purpose: llvm's version is in the path.
		compgen -G "${file%%:*}" >/dev/null || printf '%s\n' "${file#*:}"
	done
	for tool in "${TOOLS[@]}"; do
		command -v "${tool%%:*}" >/dev/null || printf '%s\n' "${tool#*:}"
	done
}

# What packs the Debian package; Debian 12 has none. Its compilation takes two and a half minutes of processor time.
install_cargo_deb() {
	command -v cargo-deb >/dev/null || ! command -v cargo >/dev/null ||
		cargo install --quiet --locked cargo-deb@3.8.0 || echo "cargo-deb could not be installed" >&2
}

# What judges metrics and alerts. Its package starts a server of Prometheus on every address, so only the tool is taken out of it.
install_promtool() {
	! command -v promtool >/dev/null || return 0
	if ! command -v apt-get >/dev/null || [[ $(id -u) -ne 0 ]]; then
		echo "not installed, and this is no root shell with apt-get: promtool (prometheus)" >&2
		return 0
	fi
	local dir
	dir=$(mktemp -d)
	echo "installing promtool"
	(cd "$dir" && apt-get download -qq prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb |
		tar -x --to-stdout ./usr/bin/promtool >promtool && install -m 755 promtool /usr/local/bin/) 2>/dev/null ||
		echo "promtool could not be installed" >&2
	rm -rf "$dir"
}

# Twice: a package of another release that was here may have to make way for one that comes, and is then missing itself
# (qemu-utils of the backports, for qemu-system-x86).
install_packages() {
	local packages round
	export DEBIAN_FRONTEND=noninteractive
	for round in 1 2; do
		mapfile -t packages < <(missing_packages | sort -u)
		if [[ ${#packages[@]} -eq 0 ]]; then
			return 0
		fi
		if ! command -v apt-get >/dev/null || [[ $(id -u) -ne 0 ]]; then
			echo "not installed, and this is no root shell with apt-get: ${packages[*]}" >&2
			return 0
		fi
		echo "installing ${packages[*]} (round $round)"
		if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null; then
			echo "apt-get could not install all of: ${packages[*]}" >&2
		fi
	done
	mapfile -t packages < <(missing_packages | sort -u)
	[[ ${#packages[@]} -eq 0 ]] || echo "still missing after two rounds of apt-get: ${packages[*]}" >&2
}

main() {
	install_cargo_deb
	install_packages
	install_promtool
}

main "$@"
