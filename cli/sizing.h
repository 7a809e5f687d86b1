// winnow compress --size for Winnow itself: drops experts, condenses layers and takes bits from
// weights, as much of each as loses least within the size. What that is, is predicted from measured
// errors (sizing_candidates.h); the two best are made, and the better on text that no fit has seen
// becomes the output.
#pragma once

#include "compressing.h"
#include "session.h"

namespace winnow::cli {

// Whether these flags ask for it: --size, for Winnow, and nothing that says how experts go.
bool SizesByAllMeans(const CompressFlags& flags);
// Refuses --means and --bits-of-rest where they would do nothing, and what they cannot mean.
void CheckSizingFlags(const CompressFlags& flags);

int RunSizing(Session& session, CompressFlags& flags);

}  // namespace winnow::cli
