#include "transport/mpi_node.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <span>

#include "transport/mpi_handle.h"
#include "transport/node_exchange.h"

namespace hvd_backup {

namespace {

// What a rank tells the others about its segment.
struct Offer {
  char path[64] = {};        // empty: it has none
  std::uint64_t secret = 0;  // stands at the end of the segment while it is offered
};

void write_secret(const SharedSegment& segment, std::uint64_t secret) {
  std::memcpy(segment.bytes().last(sizeof secret).data(), &secret, sizeof secret);
}

bool has_secret(const SharedSegment& segment, std::uint64_t secret) {
  return std::memcmp(segment.bytes().last(sizeof secret).data(), &secret, sizeof secret) == 0;
}

bool agreed(MPI_Comm comm, bool mine) {
  int flag = mine ? 1 : 0;
  check_mpi(MPI_Allreduce(MPI_IN_PLACE, &flag, 1, MPI_INT, MPI_MIN, comm), "agreeing on shared memory");
  return flag != 0;
}

std::vector<SharedSegment> open_all(std::span<const Offer> offers, std::size_t self, SharedSegment own) {
  std::vector<SharedSegment> segments;
  for (std::size_t index = 0; index < offers.size(); ++index) {
    if (index == self) {
      segments.push_back(std::move(own));
      continue;
    }
    segments.push_back(SharedSegment::open(offers[index].path, NodeExchange::segment_bytes(offers.size())));
    if (!has_secret(segments.back(), offers[index].secret)) throw RuntimeFailure("not the segment that was offered");
  }
  return segments;
}

}  // namespace

Node find_node(MPI_Comm comm) {
  const Communicator on_node = Communicator::of_this_node(comm);
  int rank = 0;
  int size = 0;
  int index = 0;
  check_mpi(MPI_Comm_rank(comm, &rank), "asking for the rank");
  check_mpi(MPI_Comm_size(on_node.get(), &size), "asking for the node's size");
  check_mpi(MPI_Comm_rank(on_node.get(), &index), "asking for the rank on the node");

  Node node;
  node.self = static_cast<std::size_t>(index);
  node.ranks.resize(static_cast<std::size_t>(size));
  check_mpi(MPI_Allgather(&rank, 1, MPI_INT, node.ranks.data(), 1, MPI_INT, on_node.get()),
            "gathering the node's ranks");
  if (size == 1) return node;

  // A rank that fails here must not leave the others waiting: it takes part to the end and says so.
  Offer offer;
  SharedSegment own;
  try {
    own = SharedSegment::create(NodeExchange::segment_bytes(node.ranks.size()));
    std::random_device random;
    offer.secret = (std::uint64_t{random()} << 32) | random();
    write_secret(own, offer.secret);
    own.path().copy(offer.path, sizeof offer.path - 1);
  } catch (const std::exception&) {
    offer = {};
  }
  std::vector<Offer> offers(node.ranks.size());
  check_mpi(MPI_Allgather(&offer, sizeof offer, MPI_BYTE, offers.data(), sizeof offer, MPI_BYTE, on_node.get()),
            "exchanging shared memory");
  const bool all_offer = std::all_of(offers.begin(), offers.end(), [](const Offer& one) { return one.path[0] != 0; });
  if (!all_offer) return node;  // everybody sees the same offers
  try {
    node.segments = open_all(offers, node.self, std::move(own));
  } catch (const std::exception&) {
    node.segments.clear();
  }
  if (!agreed(on_node.get(), !node.segments.empty())) {
    node.segments.clear();
    return node;
  }
  node.segments[node.self].stop_offering();
  write_secret(node.segments[node.self], 0);
  return node;
}

}  // namespace hvd_backup
