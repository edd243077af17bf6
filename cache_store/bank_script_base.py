"""A bank's keys in Redis, and what all scripts on them begin with: Lua. Each script happens wholly or not at all.

KEYS are those of `bank_keys.BankKeys`, in their order:

meta          hash: incarnation, created_ms, about, embedder, dim, version, floor, next_embedder, has_near
entries       hash: what was written, by id; also what is staged
vectors       hash: by id
changes       sorted set: each id that is or was in sight, by the version that changed it last
gone          sorted set: those of `changes` that were deleted. The oldest are dropped from both; `floor` is the version
              of the last that was: who has read less than that can't know what went
superseded    hash: who lost, to whom
losers        hash: the other way round: 32 characters each, perhaps some that have lost to another since then
documents     hash: a digest and the ids of chunks, 32 characters each, by a name of the document
staged        sorted set: ids that are not in sight yet, by when they were put down
recalls, last hashes: how often an entry was recalled, and when last
next_vectors  hash: those of an embedder that the bank is to have
near          vector set: what is in sight, where the bank was made with one; next_near is of next_vectors

ARGV[1] is the incarnation that is meant, or empty. Answers begin with OK or with what was wrong.
"""

from typing import Final

from cache_store.record_scripts import Script, script

_MOST_GONE: Final = 10_000

_COMMON = (
    """
local meta, entries, vectors, changes, gone, superseded, losers = unpack(KEYS, 1, 7)
local documents, staged, recalls, last, next_vectors, near, next_near = unpack(KEYS, 8, 14)
local incarnation = redis.call('HGET', meta, 'incarnation')
if not incarnation or (ARGV[1] ~= '' and ARGV[1] ~= incarnation) then return {'MISSING'} end

local function count() return redis.call('ZCARD', changes) - redis.call('ZCARD', gone) end

local function record() return {redis.call('HGETALL', meta), count(), redis.call('HLEN', documents)} end

local function in_sight(id)
  return redis.call('HEXISTS', entries, id) == 1 and not redis.call('ZSCORE', staged, id)
end

local function touch(id)
  local version = redis.call('HINCRBY', meta, 'version', 1)
  redis.call('ZADD', changes, version, id)
  return version
end

local function lose(loser, winner)
  redis.call('HSET', superseded, loser, winner)
  redis.call('HSET', losers, winner, (redis.call('HGET', losers, winner) or '') .. loser)
  touch(loser)
end

local has_near = redis.call('HGET', meta, 'has_near') == '1'

-- `value` is float32, little-endian, behind a byte that says that it is in the clear.
local function place(set, id, value)
  if has_near then redis.call('VADD', set, 'FP32', value:sub(2), id) end
end

local function show(id)
  place(near, id, redis.call('HGET', vectors, id))
  redis.call('ZREM', staged, id)
  redis.call('ZREM', gone, id)
  touch(id)
end

-- The first command writes nothing that a full server refuses; after it, it refuses nothing.
local function drop(id)
  for _, of_entry in ipairs({entries, vectors, next_vectors, recalls, last}) do redis.call('HDEL', of_entry, id) end
  local heir, lost = redis.call('HGET', superseded, id), redis.call('HGET', losers, id) or ''
  redis.call('HDEL', superseded, id)
  redis.call('HDEL', losers, id)
  if has_near then
    redis.call('VREM', near, id)
    redis.call('VREM', next_near, id)
  end
  for at = 1, #lost, 32 do
    local loser = lost:sub(at, at + 31)
    if redis.call('HGET', superseded, loser) == id then
      if heir then lose(loser, heir) else redis.call('HDEL', superseded, loser); touch(loser) end
    end
  end
  redis.call('ZADD', gone, touch(id), id)
end

local function trim()
  local extra = redis.call('ZCARD', gone) - """
    + str(_MOST_GONE)
    + """
  if extra <= 0 then return end
  local oldest = redis.call('ZPOPMIN', gone, extra)
  for at = 1, #oldest, 2 do redis.call('ZREM', changes, oldest[at]) end
  redis.call('HSET', meta, 'floor', oldest[#oldest])
end

-- Nil, or an answer that says why nothing of this embedder can be put down. A bank without entries takes any.
local function foreign(embedder)
  local has = redis.call('HGET', meta, 'embedder')
  if has ~= embedder and redis.call('HLEN', entries) > 0 then return {'EMBEDDER', has} end
end

local function write(id, entry, vector)
  redis.call('HSET', entries, id, entry)
  redis.call('HSET', vectors, id, vector)
end
"""
)


def of_bank(body: str) -> Script:
    """A script that answers MISSING where the bank that is meant is gone."""
    return script(_COMMON + body)
