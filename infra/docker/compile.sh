#!/bin/sh
# Compiles what was installed below a root, once, into bytecode that does not depend on the time: the files of an image
# get other times, and Python would compile all of it anew in each process. Without any, libraries take more than twice
# as long to load.
set -u
# Libraries' own tests are loaded by nobody. What does not compile is for newer Pythons, and is not loaded either.
python -m compileall -qq -x '/tests/' -j 0 --invalidation-mode unchecked-hash -s "$1" -p / "$1" || true
