#!/bin/sh
# The compiled views with gcc's address sanitizer, in a copy of this checkout, under the same damaged files:
#   sh tests/damage/asan.sh betons 10000
# PYTHON names the interpreter (else python). Exit code and output are those of run.py; what the sanitizer finds ends a case as a crash.
set -e
here=$(cd "$(dirname "$0")/../.." && pwd)
copy=${ASAN_FOLDER:-$(mktemp -d)}
python=${PYTHON:-python}
mkdir -p "$copy"
cp -r "$here/caco" "$here/conf" "$here/tests" "$copy"
views=$copy/caco/data/views
library=$(ls "$views"/_views*.so)
if [ ! -e "$copy/built" ]; then
    g++ -shared -fPIC -g -O1 -std=c++17 -fno-omit-frame-pointer -fsanitize=address -ffp-contract=off -Wno-psabi -pthread \
        "$views"/*.cpp -o "$copy/built"
fi
cp "$copy/built" "$library"
export LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
cd "$copy"
exec "$python" tests/damage/run.py "$@"
