#!/usr/bin/env bash
# Install the programs that some tests drive, from Debian's packages: scripts/install_programs.sh, or make programs
# Without the right to install, or without a network, it says so and ends with status 1; it never waits for either.
set -uo pipefail

declare -A package=([chromium]=chromium [nginx]=nginx-light [node]=nodejs [openssl]=openssl [prometheus]=prometheus [promtool]=prometheus)
seconds=${STEER_PROGRAMS_SECONDS:-240} # for each of the three steps
PATH=$PATH:${STEER_PROGRAMS_PATH:-/usr/sbin} # Debian's nginx is there

missing() {
    for program in "${!package[@]}"; do
        command -v "$program" >/dev/null || echo "${package[$program]}"
    done | sort -u
}

give_up() {
    echo "The tests that need $(missing | tr '\n' ' ')are skipped: $1." >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt() { # stops waiting for a mirror after seconds, for another apt after half a minute
    as_root env DEBIAN_FRONTEND=noninteractive timeout --kill-after=10 "$seconds" apt-get --yes -qq \
        -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15 -o DPkg::Lock::Timeout=30 \
        -o APT::Update::Error-Mode=any "$@" </dev/null
}

[ -n "$(missing)" ] || { echo "Chromium, nginx, Node, OpenSSL and Prometheus are installed."; exit 0; }
command -v apt-get >/dev/null || give_up "this is not Debian, so install them yourself"
[ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null || give_up "installing needs root, or sudo without a password"

mapfile -t wanted < <(missing)
echo "==> installing ${wanted[*]}"
began=$SECONDS
apt update || give_up "the lists of Debian's packages could not be read"
# A download may be stopped at any time; an installation is never cut off by a slow mirror.
apt install --no-install-recommends --download-only "${wanted[@]}" >/dev/null || give_up "the packages could not be downloaded"
apt install --no-install-recommends "${wanted[@]}" >/dev/null || give_up "the packages could not be installed"
[ -z "$(missing)" ] || give_up "the packages were installed, but the programs are not there"
echo "==> installed in $((SECONDS - began)) s"
