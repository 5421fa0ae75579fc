// Whose process has died, where MPI survives that: User Level Failure Mitigation, part of MPI 5 and of Open MPI 5 when
// it is started with `mpirun --with-ft ulfm`. Elsewhere the launcher ends all ranks when one dies.
#pragma once

#include <mpi.h>

#include <vector>

namespace hvd_backup {

class MpiLosses {
 public:
  // Watches the ranks of this communicator, which outlives it.
  explicit MpiLosses(MPI_Comm comm);

  bool are_survived() const { return are_survived_; }
  std::vector<int> take();  // those found since the last call; costs a fraction of a microsecond
  bool includes(int rank) const { return is_lost_[static_cast<std::size_t>(rank)]; }

 private:
  const MPI_Comm comm_;
  bool are_survived_ = false;
  int known_ = 0;  // how many
  std::vector<bool> is_lost_;
};

}  // namespace hvd_backup
