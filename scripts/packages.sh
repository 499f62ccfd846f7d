#!/usr/bin/env bash
# Installs what the other scripts need and this machine lacks: scripts/packages.sh [cc] [c++] [pip] [sqlite3] [vulkan] [chromium]
set -euo pipefail
# Where ldconfig is, which users' paths may leave out.
PATH=$PATH:/usr/sbin:/sbin
missing=()
for what in "$@"; do
    case $what in
        cc) command -v cc >/dev/null || missing+=(gcc libc6-dev) ;;
        c++) command -v c++ >/dev/null || missing+=(g++) ;;
        pip)
            python3 -c "import pip, ensurepip" >/dev/null 2>&1 || missing+=(python3 python3-pip python3-venv)
            ;;
        sqlite3) command -v sqlite3 >/dev/null || missing+=(sqlite3) ;;
        chromium) command -v chromium >/dev/null || missing+=(chromium) ;;
        vulkan)
            # A loader, and a driver for it.
            { ldconfig -p | grep libvulkan.so.1 && compgen -G '/usr/share/vulkan/icd.d/*.json'; } >/dev/null 2>&1 ||
                missing+=(libvulkan1 mesa-vulkan-drivers)
            ;;
        *) echo "error: $what, cc, c++, pip, sqlite3, vulkan and chromium are known" >&2; exit 1 ;;
    esac
done
[ ${#missing[@]} -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "error: ${missing[*]} are missing and there is no apt-get, install them by hand" >&2
    exit 1
fi
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
"${as_root[@]}" apt-get -qq update
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
