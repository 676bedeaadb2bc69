#!/usr/bin/env bash
# Installs what the build, the tests and the scripts need, and nothing when all is there (well under a second).
# Debian packages as root or with sudo; Python packages, pinned, into .venv. Called by make; safe to call again.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ make git libcxxopts-dev libboost-context-dev libopenblas-dev nlohmann-json3-dev libgtest-dev)
python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3 python3-venv)

if ! command -v dpkg-query >/dev/null; then
  echo "setup: no dpkg here, so these Debian packages are taken as installed by other means: ${packages[*]}" >&2
else
  missing=()
  installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true)
  for package in "${packages[@]}"; do
    grep -qx "installed $package" <<<"$installed" || missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" -eq 0 ]; then as_root=()
    elif sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }; then as_root=(sudo)
    else
      echo "setup: missing Debian packages, and no way to become root here. Type:" >&2
      echo "  su -c 'apt-get update && apt-get install -y ${missing[*]}'" >&2
      exit 1
    fi
    echo "setup: installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" \
      >/dev/null
  fi
fi

if [ ! -e .venv/installed ] || ! cmp -s scripts/requirements.txt .venv/installed; then
  echo "setup: making .venv with $(grep -c '^[a-zA-Z]' scripts/requirements.txt) Python packages"
  python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r scripts/requirements.txt
  cp scripts/requirements.txt .venv/installed
fi
