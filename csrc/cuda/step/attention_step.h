// project_step() and decode_attention() of a layer that reads few rows, in one kernel: a cluster of
// blocks computes the query, key and value of a head and attends, without the detour through global
// memory.
#pragma once

#include "../attention/decode_attention.h"
#include "product.h"

namespace tlinformer::cuda {

// Whether the device has clusters, the layer's rows fit into their shared memory, and there is one
// sequence: more are served better by products that read the weights once.
bool takes_attention_step(const ProjectStep& p, const DecodeAttention& a);

// p.query, a.query and a.scratch are not used.
void attention_step(const ProjectStep& p, const DecodeAttention& a, const Launch& how);

}  // namespace tlinformer::cuda
