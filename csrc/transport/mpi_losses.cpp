#include "transport/mpi_losses.h"

#include <cstddef>
#include <numeric>

#include "transport/mpi_handle.h"

namespace hvd_backup {

MpiLosses::MpiLosses(MPI_Comm comm) : comm_(comm) {
  int size = 0;
  check_mpi(MPI_Comm_size(comm, &size), "asking for the size");
  is_lost_.resize(static_cast<std::size_t>(size));
#ifdef OMPI_HAVE_MPIX_COMM_GET_FAILED
  int* value = nullptr;
  int found = 0;
  check_mpi(MPI_Comm_get_attr(MPI_COMM_WORLD, MPIX_FT, &value, &found), "asking whether lost processes are survived");
  are_survived_ = found != 0 && *value != 0;
#endif
}

std::vector<int> MpiLosses::take() {
  std::vector<int> news;
#ifdef OMPI_HAVE_MPIX_COMM_GET_FAILED
  if (!are_survived_) return news;
  MPI_Group failed = MPI_GROUP_NULL;
  check_mpi(MPIX_Comm_get_failed(comm_, &failed), "asking who has died");
  int count = 0;
  MPI_Group_size(failed, &count);
  if (count > known_) {
    known_ = count;
    std::vector<int> places(static_cast<std::size_t>(count)), ranks(places.size());
    std::iota(places.begin(), places.end(), 0);
    MPI_Group all = MPI_GROUP_NULL;
    check_mpi(MPI_Comm_group(comm_, &all), "asking for the ranks");
    check_mpi(MPI_Group_translate_ranks(failed, count, places.data(), all, ranks.data()), "asking who has died");
    MPI_Group_free(&all);
    for (const int rank : ranks) {
      const auto index = static_cast<std::size_t>(rank);
      if (!is_lost_[index]) news.push_back(rank);
      is_lost_[index] = true;
    }
  }
  if (failed != MPI_GROUP_EMPTY) MPI_Group_free(&failed);
#endif
  return news;
}

}  // namespace hvd_backup
