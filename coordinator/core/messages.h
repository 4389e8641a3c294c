// Short names for the two packages of messages. They are plain data here: nothing in core/ does I/O.
#pragma once

#include "refocus/internal/v1/group.pb.h"
#include "refocus/v1/cluster.pb.h"
#include "refocus/v1/context.pb.h"
#include "refocus/v1/inference.pb.h"

namespace refocus {
namespace api = v1;             // what clients see
namespace wire = internal::v1;  // what ranks see
}  // namespace refocus
