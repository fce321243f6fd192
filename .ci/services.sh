#!/usr/bin/env bash
# What the tests start besides Python: Slurm, Open MPI, MPICH, pdsh, sshd. Quiet, quick where it is there already, and never an
# error: a test that lacks a program is skipped and says which one.
set -u
declare -A package_of=(
    [slurmctld]=slurm-wlm [munged]=munge [mpirun.openmpi]=openmpi-bin [mpiexec.hydra]=mpich [pdsh]=pdsh
    [sshd]=openssh-server [ssh]=openssh-client [ip]=iproute2
)
missing=()
for program in "${!package_of[@]}"; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, so some tests are skipped: ${missing[*]}"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# packages would start their services, which nobody here needs
policy=/usr/sbin/policy-rc.d
made_policy=
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made_policy=yes
fi
trap '[ -z "$made_policy" ] || rm -f "$policy"; rm -f "$log"' EXIT
get=(timeout 100 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o DPkg::Lock::Timeout=60)
if ! { "${get[@]}" update && "${get[@]}" install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    echo "could not be installed, so some tests are skipped: ${missing[*]} ($(tail -n 1 "$log"))"
fi
exit 0
