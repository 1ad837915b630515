"""The columns of logged requests.

The columns of user, candidate, context and time have their names of the interaction log, as features saw them. What the
server adds has names that begin with `served_` (files of earlier versions lack some of them):

| column | type | meaning |
|---|---|---|
| `served_request` | int64 or string | the request's id: the caller's own, or the one that the reply holds |
| `served_at` | timestamp | when the reply was made, UTC |
| `served_rank` | int32 | place in the reply; 1 is best |
| `served_candidates` | int32 | candidates of the request, of which `top_k` may have left some out of the reply |
| `served_score` | float64 | the score |
| `served_predicted_NAME` | float32 | the prediction of each task and outcome |
| `served_weights` | string | the caller's `task_weights` as JSON, null where none were given |
| `served_digest_NAME` | int32 | a hash of what the model read of each feature, see `mmoe_rec.request_log.digest` |
| `served_model`, `served_version` | string | the model's name, and its version in the registry, null without one |
| `served_artifact` | string | the artifact's version, as in replies |
| `served_tables_as_of` | string | the time of the last logged request that the model's tables know, ISO 8601 |
| `served_journal_position` | string | up to where of the journal the model knew events, null without a journal |
| `served_share` | float64 | the share of all requests that were logged |
"""

from __future__ import annotations

PREFIX = "served_"
REQUEST = "served_request"
AT = "served_at"
RANK = "served_rank"
CANDIDATES = "served_candidates"
SCORE = "served_score"
PREDICTED = "served_predicted_"
WEIGHTS = "served_weights"
DIGEST = "served_digest_"
MODEL = "served_model"
VERSION = "served_version"
ARTIFACT = "served_artifact"
TABLES_AS_OF = "served_tables_as_of"
JOURNAL_POSITION = "served_journal_position"
SHARE = "served_share"
