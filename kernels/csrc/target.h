// DEJAVU_TARGET_BEGIN(isa) ... DEJAVU_TARGET_END: functions in between are compiled for these instruction
// sets. In the source rather than in compiler flags, because setuptools gives all files of an extension the
// same flags.
#pragma once

#define DEJAVU_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DEJAVU_TARGET_BEGIN(isa) \
  DEJAVU_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define DEJAVU_TARGET_END DEJAVU_PRAGMA(clang attribute pop)
#else
#define DEJAVU_TARGET_BEGIN(isa) DEJAVU_PRAGMA(GCC push_options) DEJAVU_PRAGMA(GCC target(isa))
#define DEJAVU_TARGET_END DEJAVU_PRAGMA(GCC pop_options)
#endif
