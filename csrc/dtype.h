#pragma once

// The element types that the kernels support, as a plain C enum, because the launchers take no torch types.
typedef enum { kFloat32, kBFloat16, kFloat64, kFloat16 } MegaliteDType;
