#!/usr/bin/env bash
# Runs nucseg from this folder: no installation, no network, and nothing is written outside this folder.
#   bash start.sh --minutes 8      experiments that have no result yet, then results.zip; the next start goes on
#   bash start.sh notebooks        the five notebooks by papermill, then results.zip
#   bash start.sh status           any other nucseg command, with this folder's code, data and weights
# PYTHON names the interpreter that has torch; python3 if it is not set.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
profile=@profile@
dataset=@dataset@
wheels_python=@python@
[[ $profile == */* ]] && profile=$here/$profile
[[ $dataset == */* ]] && dataset=$here/$dataset

# Found before HOME changes: the interpreter behind a shim, and packages installed for this user.
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
PYTHONUSERBASE=${PYTHONUSERBASE:-$("$python" -c 'import site; print(site.getuserbase())')}
export PYTHONUSERBASE PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$here:$here/site${PYTHONPATH:+:$PYTHONPATH}
export NUCSEG_HOME=$here NUCSEG_DATA=$here/data NUCSEG_WEIGHTS=$here/weights JUPYTER_PATH=$here/site/share/jupyter

# Caches of matplotlib, IPython, triton and CUDA follow HOME and TMPDIR.
unset MPLCONFIGDIR IPYTHONDIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR TORCH_HOME CUDA_CACHE_PATH
unset XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME XDG_STATE_HOME XDG_RUNTIME_DIR
unset TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR NUMBA_CACHE_DIR JOBLIB_TEMP_FOLDER
export HOME=$here/.cache/home TMPDIR=$here/.tmp
mkdir -p "$HOME" "$TMPDIR"

"$python" -m nucseg.bundle.wheels "$here/wheels" "$here/site"

if [[ -f $here/so-far.zip ]]; then
  if "$python" -m nucseg results add "$here/so-far.zip"; then
    rm "$here/so-far.zip"
  else
    echo "Goes on with the results that are in this folder alone." >&2
  fi
fi

status=0
case "${1:-}" in
  notebooks)
    shift
    has=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [[ $has != "$wheels_python" ]]; then
      echo "The wheels here are for Python $wheels_python, this is $has: make the bundle again with --python $has" >&2
      exit 1
    fi
    if ! missing=$("$python" -c 'import ipykernel.kernelapp, nbconvert, papermill' 2>&1); then
      echo "Notebooks need a package that neither this Python nor wheels/ has: ${missing##*$'\n'}" >&2
      echo "Install it here, or make the bundle again with --wheel NAME for each (and for those that it has now)" >&2
      exit 1
    fi
    if ((${#here} > 70)); then
      echo "Kernels need a short path: move this folder to one of at most 70 characters, or name it by a link" >&2
      exit 1
    fi
    "$python" -m nucseg reproduce --profile "$profile" --dataset "$dataset" "$@" || status=$?
    ;;
  "" | -*)
    "$python" -m nucseg run --profile "$profile" --dataset "$dataset" "$@" || status=$?
    ;;
  *)
    exec "$python" -m nucseg "$@"
    ;;
esac
"$python" -m nucseg results pack --out "$here/results.zip" || exit
exit $status
