#!/usr/bin/env bash
# The benchmark at full width on a GPU machine without network, in two steps:
#
#   benchmarks/gpu.sh pack BUNDLE ~/data/cifar10   # here, with network: all that is needed, in a folder
#   benchmarks/gpu.sh run BUNDLE OUT               # there: one call, at most LIMIT seconds
#
# `pack` puts the images into an archive and collects the wheels that a bare CUDA machine with torch,
# torchvision, lightning, torchmetrics, scipy and safetensors lacks. PYTHON_VERSION (3.12) is that of
# the machine.
# `run` first runs the tests that need a GPU, then trains the networks and runs the defenses on them,
# as far as the time goes, and leaves OUT/cells.tar.gz. With RESULTS, a folder of earlier cells, it
# goes on behind these; their networks are trained anew. For a trial elsewhere: CONFIG
# (benchmarks/configs/gpu.yaml), DEVICE (cuda), LIMIT (480), JOBS (4), TESTS (those that need a GPU;
# "" for none).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
limit=${LIMIT:-480}

usage() {
    sed -n '2,5p' "$0" >&2
    exit 2
}

pack() {
    local bundle=$1 data=$2
    rm -rf "$bundle/wheels" "$bundle"/data.tar*  # those of another version would not be installed
    mkdir -p "$bundle/wheels"
    # A fifth of the size: small JPEGs have much the same headers.
    tar -C "$data" -chJf "$bundle/data.tar.xz" .
    # What the machine has is left out: its torch fits its driver.
    python3 -m pip download --quiet --only-binary :all: --no-deps --python-version "${PYTHON_VERSION:-3.12}" \
        --dest "$bundle/wheels" \
        cloudpickle docstring-parser exceptiongroup hypothesis importlib-resources iniconfig joblib \
        jsonargparse markdown-it-py mdurl narwhals pluggy pygments pytest rich scikit-learn \
        sortedcontainers threadpoolctl tomli typeshed-client
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$bundle/wheels" "$here"
    du -sh "$bundle"
}

run() {
    local bundle out work
    mkdir -p "$2"
    bundle=$(realpath "$1")
    out=$(realpath "$2")
    work=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work/data" "$work/cells"
    python3 -m tarfile -e "$bundle/data.tar.xz" "$work/data"  # xz may be missing
    if compgen -G "$bundle/wheels/*.whl" >/dev/null; then
        python3 -m pip install --quiet --no-index --no-deps --target "$work/site" "$bundle"/wheels/*.whl
    fi
    export PYTHONPATH="$here:$work/site${PYTHONPATH:+:$PYTHONPATH}"
    if [ -n "${RESULTS:-}" ]; then cp "$RESULTS"/*.json "$work/cells/"; fi
    cd "$here"
    local tests=${TESTS--m cuda tests/test_cuda.py}
    if [ -n "$tests" ]; then
        # shellcheck disable=SC2086
        timeout $((limit / 4)) python3 -m pytest -q -p no:cacheprovider $tests \
            2>&1 | tee "$out/tests.log" | tail -n 5 || echo "tests failed, see $out/tests.log"
    fi
    # Thirty seconds are kept for the last cell to be longer than thought, and for the archive.
    local left=$((limit - SECONDS - 30)) code=0
    if [ "$left" -le 0 ]; then
        echo "no time is left for cells: LIMIT is $limit s, and unpacking and tests took $SECONDS" >&2
        exit 1
    fi
    timeout $((left + 20)) python3 -m lightning_mnp.cli benchmark run --progress false \
        --config "${CONFIG:-benchmarks/configs/gpu.yaml}" --device "${DEVICE:-cuda}" \
        --data "$work/data" --networks "$work/networks" --out "$work/cells" \
        --jobs "${JOBS:-4}" --budget "${left}s" 2>&1 | tee "$out/run.log" || code=$?
    tar -C "$work" -czf "$out/cells.tar.gz" cells
    tar -tzf "$out/cells.tar.gz" | grep -c '\.json$' || code=1  # no cell at all
    # 124: the time was up, which is how a run usually ends.
    if [ "$code" -ne 0 ] && [ "$code" -ne 124 ]; then
        echo "ended with code $code, see $out/run.log" >&2
        exit "$code"
    fi
}

case "${1:-} $#" in
    "pack 3") pack "$2" "$3" ;;
    "run 3") run "$2" "$3" ;;
    *) usage ;;
esac
