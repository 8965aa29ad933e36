/* platform: what every module may assume about the compiler, and the linkage macros.
   The only module that tests the platform; everything else is plain C99 that is also C++11. */
#ifndef LLMPAR_PLATFORM_H
#define LLMPAR_PLATFORM_H

/* Modules built one by one include this before any system header; the generated header does the same at its top. */
#ifdef LLMPAR__SEPARATE
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

#include <stddef.h>
#include <stdint.h>

#if !defined(__GNUC__)
#error "llmpar: needs gcc >= 9 or clang >= 11 (vector extensions and __atomic builtins)"
#endif
#if !defined(__linux__) && !defined(__APPLE__)
#error "llmpar: supports Linux (glibc, musl); macOS compiles; other systems are not supported"
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#error "llmpar: supports x86-64 and aarch64"
#endif
#if defined(__CUDACC__) && defined(LLMPAR_IMPLEMENTATION)
#error "llmpar: define LLMPAR_IMPLEMENTATION in a .c or .cc file, not in one compiled by nvcc; .cu files get the declarations"
#endif

/* The version: the only place that states it (make install, pkg-config and CMake read these three lines). */
#define LLMPAR_VERSION_MAJOR 0
#define LLMPAR_VERSION_MINOR 1
#define LLMPAR_VERSION_PATCH 0
#define LLMPAR_VERSION_NUMBER (LLMPAR_VERSION_MAJOR * 1000000 + LLMPAR_VERSION_MINOR * 1000 + LLMPAR_VERSION_PATCH)
#define LLMPAR_VERSION LLMPAR__VERSION_TEXT(LLMPAR_VERSION_MAJOR, LLMPAR_VERSION_MINOR, LLMPAR_VERSION_PATCH) /* "0.1.0" */
#define LLMPAR__VERSION_TEXT(major, minor, patch) LLMPAR__TEXT(major) "." LLMPAR__TEXT(minor) "." LLMPAR__TEXT(patch)
#define LLMPAR__TEXT(x) #x

/* Linkage. LLMPAR_API may be defined by the user (visibility). LLMPAR_STATIC makes every public
   function static. LLMPAR__PRIVATE marks functions shared between modules but not with users: static in the
   generated header, extern when the modules are built one by one (LLMPAR__SEPARATE). */
#ifndef LLMPAR_API
#ifdef LLMPAR_STATIC
#define LLMPAR_API static LLMPAR__UNUSED
#else
#define LLMPAR_API extern
#endif
#endif
#define LLMPAR__UNUSED __attribute__((unused))
#ifdef LLMPAR__SEPARATE
#define LLMPAR__PRIVATE extern
#define LLMPAR__PRIVATE_DEF
#else
#define LLMPAR__PRIVATE static LLMPAR__UNUSED
#define LLMPAR__PRIVATE_DEF static LLMPAR__UNUSED
#endif
/* A definition of a LLMPAR_API function begins with LLMPAR_DEF, of a LLMPAR__PRIVATE one with LLMPAR__PRIVATE_DEF. */
#ifdef LLMPAR_STATIC
#define LLMPAR_DEF static LLMPAR__UNUSED
#else
#define LLMPAR_DEF
#endif

/* A variable with its empty value. */
#define LLMPAR__ZEROED(type, name) type name; memset(&name, 0, sizeof name)
#define LLMPAR_RESTRICT __restrict
#define LLMPAR_PRINTF(format_index, first) __attribute__((format(printf, format_index, first)))

#ifdef __cplusplus
#define LLMPAR_EXTERN_C_BEGIN extern "C" {
#define LLMPAR_EXTERN_C_END }
#else
#define LLMPAR_EXTERN_C_BEGIN
#define LLMPAR_EXTERN_C_END
#endif

#endif
