#pragma once

// The element types our kernels know, as a plain C enum: the launchers take no torch types.
typedef enum { kFloat32, kBFloat16, kFloat64, kFloat16 } MegaliteDType;
