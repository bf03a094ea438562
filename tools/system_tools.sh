#!/bin/sh
# What the simulated device needs on Linux besides Python: clang-19, llvm-19, lld-19 and a C++ compiler.
# Installs them with apt where that is possible; else says what is missing and fails.
[ "$(uname -s)" = Darwin ] && exit 0

missing=""
command -v clang++-19 >/dev/null 2>&1 || missing="$missing clang-19"
command -v llvm-symbolizer-19 >/dev/null 2>&1 || missing="$missing llvm-19"
command -v ld.lld-19 >/dev/null 2>&1 || missing="$missing lld-19"
command -v c++ >/dev/null 2>&1 || missing="$missing g++"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "Installing$missing"
  # shellcheck disable=SC2086
  apt-get update -qq >/dev/null &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null && exit 0
fi
echo "The simulated mps device needs$missing: install the packages (as root: apt-get install$missing)." >&2
exit 1
