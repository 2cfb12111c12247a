#!/usr/bin/env bash
# Tools of one Xen release on a hypervisor of a later one, as after half an upgrade: xl-colo says so, and what to do.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

readonly LATER=$DIR/build/later
readonly RELEASE=trixie

# apt-get on the machine's own package sources, of the next release, with nothing of the machine's own touched.
apt() {
	"$1" -qq -o Dir::Etc::sourcelist="$LATER/sources.list" -o Dir::Etc::sourceparts="$LATER/sources.d" \
		-o Dir::State::lists="$LATER/lists" -o Dir::Cache="$LATER/cache" -o Debug::NoLocking=1 "${@:2}"
}

fetch() {
	local file package
	mkdir -p "$LATER"/{sources.d,lists/partial,cache/archives/partial}
	for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
		[[ $file != *.list || ! -s $file ]] || sed "s/bookworm/$RELEASE/g" "$file" >>"$LATER/sources.list"
		[[ $file != *.sources ]] || sed "s/bookworm/$RELEASE/g" "$file" >"$LATER/sources.d/$(basename "$file")"
	done
	apt apt-get update || return 1
	package=$(apt apt-cache pkgnames xen-hypervisor-4 | grep -E '^xen-hypervisor-[0-9.]+-amd64$' | grep -v -F 4.17 | sort -V | tail -n 1)
	[[ -n $package ]] || return 1
	echo "the hypervisor of $package"
	(cd "$LATER" && apt apt-get download "$package" && dpkg-deb -x "$package"_*.deb unpacked) || return 1
	zcat "$LATER"/unpacked/boot/xen-*.gz >"$LATER/xen.elf"
}

if [[ ! -s $LATER/xen.elf ]]; then
	rm -rf "$LATER"
	fetch >"$DIR/build/later.log" 2>&1 || skip "no hypervisor of a later release could be fetched: $(tail -n 1 "$DIR/build/later.log")"
fi

# Nobody after this finds a host of that kind.
trap 'nested down' EXIT
nested down
XEN_ELF=$LATER/xen.elf nested up a
release=$(host a 'cat /sys/hypervisor/version/major /sys/hypervisor/version/minor | paste -sd.')
holds "the hypervisor is not the tools' ($release)" test "$release" != 4.17
said=$(host a 'xl-colo check' 2>&1 || true)
echo "$said"
holds "check names both" grep -q "tools 4.17, hypervisor $release" <<<"$said"
holds "and says what to do" grep -q "install the matching xen-utils-$release" <<<"$said"
said=$(host a 'xl-colo host --name a --listen 10.78.0.1:9740 --guest pvh --xen /etc/xen/guests/pvh.cfg --disk /run/pvh.img --policy hold \
	--disk-mib 16' 2>&1 || true)
echo "$said"
holds "a host does not begin either" grep -q "tools 4.17, hypervisor $release" <<<"$said"
