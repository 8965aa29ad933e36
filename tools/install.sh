#!/bin/sh
# make install, make uninstall: headers, pkg-config file, CMake package and documentation below $DESTDIR$PREFIX.
#
#     PREFIX=/usr/local DESTDIR= INCLUDEDIR=include tools/install.sh install|uninstall
#
# INCLUDEDIR is taken below PREFIX unless it is absolute. The version comes from llmpar.h.
case $1 in -h | --help) sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$0"; exit ;; esac
cd "$(dirname "$0")/.." || exit 1
prefix=${PREFIX:-/usr/local} includedir=${INCLUDEDIR:-include}
case $prefix in
/*) ;;
*) echo "install: PREFIX = $prefix, expected an absolute path" >&2; exit 2 ;;
esac
prefix=${prefix%/}
case $includedir in
"$prefix"/*) includedir=${includedir#"$prefix"/} ;; # as below PREFIX: the installed tree may then be moved
esac
case $includedir in
/*) include=$includedir pc_include=$includedir ;;
*) include=$prefix/$includedir pc_include='${prefix}'/$includedir ;;
esac
root=$DESTDIR
headers='llmpar.h llmpar_cuda.h llmpar_nccl.h'
pkgconfig=$root$prefix/share/pkgconfig
package=$root$prefix/share/cmake/llmpar
doc=$root$prefix/share/doc/llmpar

# filled FILE: a template with its values; sed's own characters in them are quoted
quoted() { printf '%s' "$1" | sed 's/[&|\\]/\\&/g'; }
filled()
{
    sed -e "s|@LLMPAR_VERSION@|$version|" -e "s|@LLMPAR_PREFIX@|$(quoted "$prefix")|" -e "s|@LLMPAR_INCLUDE_DIR@|$(quoted "$includedir")|" \
        -e "s|@LLMPAR_PC_INCLUDE_DIR@|$(quoted "$pc_include")|" "$1"
}

install_all()
{
    set -e
    version=$(awk '$2 ~ /^LLMPAR_VERSION_(MAJOR|MINOR|PATCH)$/ { text = text (text == "" ? "" : ".") $3 } END { print text }' llmpar.h)
    case $version in
    [0-9]*.[0-9]*.[0-9]*) ;;
    *) echo "install: llmpar.h: no version: expected three lines #define LLMPAR_VERSION_MAJOR, _MINOR, _PATCH, got \"$version\"" >&2; exit 1 ;;
    esac
    mkdir -p "$root$include" "$pkgconfig" "$package" "$doc/docs"
    for file in $headers; do install -m 644 "$file" "$root$include/$file"; done
    filled cmake/llmpar.pc.in >"$pkgconfig/llmpar.pc"
    filled cmake/llmparConfig.cmake.in >"$package/llmparConfig.cmake"
    filled cmake/llmparConfigVersion.cmake.in >"$package/llmparConfigVersion.cmake"
    install -m 644 cmake/llmparTargets.cmake "$package/llmparTargets.cmake"
    chmod 644 "$pkgconfig/llmpar.pc" "$package"/*.cmake
    for file in README.md LICENSE CHANGELOG.md docs/*.md docs/*.svg; do
        if [ -f "$file" ]; then install -m 644 "$file" "$doc/$file"; fi
    done
    echo "llmpar $version: installed below $root$prefix"
}

# Folders of its own go as a whole; those that it shares with others stay, even empty.
uninstall_all()
{
    for file in $headers; do rm -f "$root$include/$file"; done
    rm -f "$pkgconfig/llmpar.pc"
    rm -rf "$package" "$doc"
    echo "llmpar: removed from $root$prefix"
}

case $1 in
install) install_all ;;
uninstall) uninstall_all ;;
*) echo "usage: tools/install.sh install|uninstall" >&2; exit 2 ;;
esac
