#!/usr/bin/env bash
# Makes .venv and brings what the demo or the tests need. Usage: setup.sh demo|dev
# What is missing on the machine is installed by apt when root or password-less sudo allows, else named in one error.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-demo}
venv=${VENV:-.venv}
packages=()
command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || packages+=(mosquitto)
python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
if [ "$what" = dev ]; then
    command -v chromium >/dev/null || packages+=(chromium)
    command -v softhsm2-util >/dev/null || packages+=(softhsm2)
    command -v promtool >/dev/null || packages+=(prometheus)
    ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || packages+=(faketime)
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null || packages+=(postgresql)
    command -v gcc >/dev/null || packages+=(gcc libc6-dev)
fi

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or newer is needed as python3; install it first (Debian 12: apt-get install python3)" >&2
    exit 1
fi

if [ ${#packages[@]} -gt 0 ]; then
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        echo "error: missing on this machine: ${packages[*]}. Install with: sudo apt-get install ${packages[*]}" >&2
        exit 1
    fi
    echo "installing by apt: ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # RUNLEVEL=1 keeps Debian from starting a broker of its own: the server runs its own, with its own rights. Nor is a
    # Prometheus to run that nobody asked for: tests start one on a port of their own.
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
    case " ${packages[*]} " in *" prometheus "*) "${as_root[@]}" systemctl disable --quiet prometheus 2>/dev/null || true ;; esac
fi

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    echo "making $venv"
    python3 -m venv "$venv"
fi

extras=agent,server,cli,converters,simulator
if [ "$what" = dev ]; then extras=dev; fi
stamp="$venv/.installed-$extras"
wanted=$(sha256sum setup.cfg pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing edgewarden[$extras] into $venv (a few minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
    echo "$wanted" >"$stamp"
fi
