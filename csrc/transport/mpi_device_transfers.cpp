#include "transport/mpi_device_transfers.h"

namespace hvd_backup {

void MpiDeviceTransfers::give_up(int tag) {
  transfers_.give_up(tag);
  given_up_.push_back(tag);
  if (given_up_.size() > most_given_up) given_up_.pop_front();
}

void MpiDeviceTransfers::progress(std::vector<OnDone>* finished) {
  transfers_.progress(finished);
  if (given_up_.empty()) return;
  const int tag = given_up_.front();
  given_up_.pop_front();
  given_up_.push_back(tag);
  try {
    MatchedMessage matched;
    if (matched.probe(comm_.get(), tag)) transfers_.throw_away(matched);
  } catch (const PeerLost&) {
    acknowledge_losses(comm_.get());
  }
}

}  // namespace hvd_backup
