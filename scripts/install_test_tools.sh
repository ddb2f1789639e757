#!/usr/bin/env bash
# Install what some tests need beside Python: Slurm (a real cluster in namespaces), shellcheck, Chromium (the report
# is opened in it), and jpegtran. Does nothing where they are installed, where PIPELINE_NO_INSTALL is set, or without root on Debian or
# Ubuntu; the tests that need them then skip and say so.
set -eu

missing=()
for tool in slurmctld slurmd sbatch munged shellcheck ip chromium jpegtran; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("$tool")
done
((${#missing[@]})) || exit 0

if [[ -n ${PIPELINE_NO_INSTALL:-} ]]; then
    echo "not installed, as PIPELINE_NO_INSTALL is set: ${missing[*]}; the tests that need them skip"
    exit 0
fi
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "not installed: ${missing[*]}; the tests that need them skip (root on Debian or Ubuntu would install them)"
    exit 0
fi
packages=(slurmctld slurmd slurm-client munge shellcheck iproute2 util-linux chromium libjpeg-turbo-progs)
echo "installing with apt-get, as root, for the tests: ${packages[*]} (to decline: PIPELINE_NO_INSTALL=1, or --fast)"
install() { apt-get install -y -q --no-install-recommends "${packages[@]}"; }
export DEBIAN_FRONTEND=noninteractive
# A package's own daemon must not start: policy-rc.d is how Debian is told so.
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
install >/dev/null 2>&1 || { apt-get update -q >/dev/null && install; } ||
    echo "could not install ${packages[*]}; the tests that need them skip"
