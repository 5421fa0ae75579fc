// Which ranks of a communicator run on this machine, and the memory that they share.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <vector>

#include "transport/shared_segment.h"

namespace hvd_backup {

struct Node {
  std::vector<int> ranks;               // of this node, ascending, as numbered in the communicator
  std::size_t self = 0;                 // this rank's index among them
  std::vector<SharedSegment> segments;  // by index; empty when the node's ranks cannot share memory
};

// Collective over `comm`. Without shared memory when this rank is alone on its node, or when any rank of the node
// cannot create a segment or open another's (memory limits, ranks in separate containers): all of them agree on it.
Node find_node(MPI_Comm comm);

}  // namespace hvd_backup
