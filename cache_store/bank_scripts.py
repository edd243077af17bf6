"""What happens to a bank's keys in Redis, each time all or nothing: Lua scripts.

KEYS are those of `redis_banks.BankKeys`, in their order:

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


def _of_bank(body: str) -> Script:
    return script(_COMMON + body)


# ARGV: -, whether it is to have a vector set, if there are any, then meta's fields and values.
CREATE = script("""
local has_near = ARGV[2] == '1' and type(redis.pcall('VCARD', KEYS[13])) == 'number'
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- Our own, if the answer to the first try was lost.
  return {redis.call('HGET', KEYS[1], 'incarnation') == ARGV[4] and 'OK' or 'EXISTS', has_near and 1 or 0}
end
redis.call('HSET', KEYS[1], 'has_near', has_near and 1 or 0, unpack(ARGV, 3))
return {'OK', has_near and 1 or 0}
""")

READ = _of_bank("return {'OK', record()}")

DELETE = _of_bank("""
local had = count()
redis.call('UNLINK', unpack(KEYS))
return {'OK', had}
""")

# ARGV: incarnation, embedder, dimension, most entries, who stands, number of entries, (id, entry, vector)..., (loser,
# winner)... Answers with 1 for each that is new.
ADD = _of_bank("""
local num, is_new, new_ids = tonumber(ARGV[6]), {}, 0
local refused = num > 0 and foreign(ARGV[2])
if refused then return refused end
local known = {}
for at = 7, 4 + 3 * num, 3 do
  local fresh = not known[ARGV[at]] and not in_sight(ARGV[at])
  known[ARGV[at]] = true
  is_new[#is_new + 1] = fresh and 1 or 0
  if fresh and redis.call('HEXISTS', entries, ARGV[at]) == 0 then new_ids = new_ids + 1 end
end
if new_ids > 0 and redis.call('HLEN', entries) + new_ids > tonumber(ARGV[4]) then return {'FULL'} end
local missing = {'ENTRIES'}
for at = 7 + 3 * num, #ARGV do
  if not known[ARGV[at]] and not in_sight(ARGV[at]) then missing[#missing + 1] = ARGV[at] end
end
if #missing > 1 then return missing end
if num > 0 then
  if has_near and redis.call('HGET', meta, 'embedder') ~= ARGV[2] then redis.call('UNLINK', near) end
  redis.call('HSET', meta, 'embedder', ARGV[2], 'dim', ARGV[3])
end
for number = 1, num do
  local at = 4 + 3 * number
  if is_new[number] == 1 then
    write(ARGV[at], ARGV[at + 1], ARGV[at + 2])
    show(ARGV[at])
  end
end
for at = 7 + 3 * num, #ARGV, 2 do
  if redis.call('HGET', superseded, ARGV[at]) ~= ARGV[at + 1] then lose(ARGV[at], ARGV[at + 1]) end
end
if redis.call('HDEL', superseded, ARGV[5]) == 1 then touch(ARGV[5]) end
return {'OK', is_new}
""")

# ARGV: incarnation, embedder, dimension, most entries, now in ms, since when what is staged stays, (id, entry,
# vector)...
STAGE = _of_bank("""
for _, id in ipairs(redis.call('ZRANGEBYSCORE', staged, '-inf', '(' .. ARGV[6], 'LIMIT', 0, 500)) do
  redis.call('HDEL', entries, id)
  redis.call('HDEL', vectors, id)
  redis.call('ZREM', staged, id)
end
local refused = foreign(ARGV[2])
if refused then return refused end
local new_ids = 0
for at = 7, #ARGV, 3 do new_ids = new_ids + 1 - redis.call('HEXISTS', entries, ARGV[at]) end
if new_ids > 0 and redis.call('HLEN', entries) + new_ids > tonumber(ARGV[4]) then return {'FULL'} end
if has_near and redis.call('HGET', meta, 'embedder') ~= ARGV[2] then redis.call('UNLINK', near) end
redis.call('HSET', meta, 'embedder', ARGV[2], 'dim', ARGV[3])
for at = 7, #ARGV, 3 do
  local there = redis.call('HEXISTS', entries, ARGV[at]) == 1
  if not there then write(ARGV[at], ARGV[at + 1], ARGV[at + 2]) end
  if not there or redis.call('ZSCORE', staged, ARGV[at]) then redis.call('ZADD', staged, ARGV[5], ARGV[at]) end
end
return {'OK'}
""")

# ARGV: incarnation, name of the document, digest, ids... Answers with how many are new, and which are missing.
COMMIT_DOCUMENT = _of_bank("""
local missing, stays, new = {}, {}, 0
for at = 4, #ARGV do
  stays[ARGV[at]] = true
  if redis.call('HEXISTS', entries, ARGV[at]) == 0 then missing[#missing + 1] = ARGV[at] end
end
if #missing > 0 then return {'OK', 0, missing} end
local before = redis.call('HGET', documents, ARGV[2]) or ''
redis.call('HSET', documents, ARGV[2], table.concat(ARGV, '', 3))
for at = 4, #ARGV do
  if redis.call('ZSCORE', staged, ARGV[at]) then show(ARGV[at]); new = new + 1 end
end
for at = 33, #before, 32 do
  local id = before:sub(at, at + 31)
  if not stays[id] and in_sight(id) then drop(id) end
end
trim()
return {'OK', new, missing}
""")

# ARGV: incarnation, name of the document, digest.
HAS_DOCUMENT = _of_bank("""
local row = redis.call('HGET', documents, ARGV[2]) or ''
if row:sub(1, 32) ~= ARGV[3] then return {'OK', 0} end
for at = 33, #row, 32 do
  if redis.call('HEXISTS', entries, row:sub(at, at + 31)) == 0 then return {'OK', 0} end
end
return {'OK', 1}
""")

# ARGV: -, incarnation, embedder, version read up to, version when that was begun, most changes. Answers with the bank,
# where its reader is now, whether that is from nothing and whether it is all, what is gone, and (id, entry, vector,
# superseded by, recalls, last)...
CHANGES = _of_bank("""
local embedder = redis.call('HGET', meta, 'embedder')
local now = tonumber(redis.call('HGET', meta, 'version'))
local version, begun = tonumber(ARGV[4]), tonumber(ARGV[5])
local anew = ARGV[2] ~= incarnation or ARGV[3] ~= embedder or version > now
  or begun < tonumber(redis.call('HGET', meta, 'floor'))
if anew then version, begun = 0, now end
local most = tonumber(ARGV[6])
local page = redis.call('ZRANGEBYSCORE', changes, '(' .. version, '+inf', 'WITHSCORES', 'LIMIT', 0, most)
version = #page == 2 * most and tonumber(page[#page]) or now
if version == now then begun = now end
local went, kept = {}, {}
for at = 1, #page, 2 do
  local id = page[at]
  if redis.call('ZSCORE', gone, id) then
    went[#went + 1] = id
  else
    kept[#kept + 1] = id
    for _, of_entry in ipairs({entries, vectors, superseded, recalls, last}) do
      kept[#kept + 1] = redis.call('HGET', of_entry, id) or ''
    end
  end
end
return {'OK', record(), version, begun, anew and 1 or 0, version == now and 1 or 0, went, kept}
""")

# ARGV: incarnation, ids... Answers with (entry, superseded by, recalls, last) of each; no entry where it is gone.
ENTRIES = _of_bank("""
local kept = {}
for at = 2, #ARGV do
  local id = ARGV[at]
  kept[#kept + 1] = in_sight(id) and redis.call('HGET', entries, id) or ''
  for _, of_entry in ipairs({superseded, recalls, last}) do
    kept[#kept + 1] = redis.call('HGET', of_entry, id) or ''
  end
end
return {'OK', kept}
""")

# ARGV: incarnation, embedder, ids...
VECTORS = _of_bank("""
local refused = foreign(ARGV[2])
if refused then return refused end
local kept = {}
for at = 3, #ARGV do kept[at - 2] = in_sight(ARGV[at]) and redis.call('HGET', vectors, ARGV[at]) or '' end
return {'OK', kept}
""")

# ARGV: incarnation, ids... Answers with (recalls, last) of each.
USES = _of_bank("""
local uses = {}
for at = 2, #ARGV do
  uses[#uses + 1] = redis.call('HGET', recalls, ARGV[at]) or '0'
  uses[#uses + 1] = redis.call('HGET', last, ARGV[at]) or '0'
end
return {'OK', uses}
""")

# ARGV: incarnation, (id, recalls more, last in ms)...
ADD_USES = _of_bank("""
for at = 2, #ARGV, 3 do
  local id = ARGV[at]
  if redis.call('HEXISTS', entries, id) == 1 then
    redis.call('HINCRBY', recalls, id, ARGV[at + 1])
    if tonumber(ARGV[at + 2]) > tonumber(redis.call('HGET', last, id) or 0) then
      redis.call('HSET', last, id, ARGV[at + 2])
    end
  end
end
return {'OK'}
""")

# ARGV: incarnation, since when they must be unused or 0, number of ids, ids..., names of their documents...
REMOVE = _of_bank("""
local since, num, removed = tonumber(ARGV[2]), tonumber(ARGV[3]), {}
for at = 4, 3 + num do
  local id = ARGV[at]
  local used = since > 0 and tonumber(redis.call('HGET', last, id) or 0) >= since
  if not used and in_sight(id) then
    drop(id)
    removed[#removed + 1] = id
  end
end
for at = 4 + num, #ARGV do
  local row, has_chunks = redis.call('HGET', documents, ARGV[at]) or '', false
  for place = 33, #row, 32 do
    has_chunks = redis.call('HEXISTS', entries, row:sub(place, place + 31)) == 1
    if has_chunks then break end
  end
  if not has_chunks then redis.call('HDEL', documents, ARGV[at]) end
end
trim()
return {'OK', removed}
""")

# ARGV: incarnation, embedder.
BEGIN_REEMBED = _of_bank("""
if redis.call('HGET', meta, 'next_embedder') ~= ARGV[2] then
  redis.call('UNLINK', next_vectors, next_near)
  redis.call('HSET', meta, 'next_embedder', ARGV[2])
end
return {'OK'}
""")

_NEXT = """
local next = redis.call('HGET', meta, 'next_embedder') or ''
if next == '' and redis.call('HGET', meta, 'embedder') == ARGV[2] then return {'OK', 1} end -- already
if next ~= ARGV[2] then return {'EMBEDDER', next} end
"""

# ARGV: incarnation, embedder, (id, vector)...
PUT_VECTORS = _of_bank(
    _NEXT
    + """
for at = 3, #ARGV, 2 do
  if in_sight(ARGV[at]) then
    redis.call('HSET', next_vectors, ARGV[at], ARGV[at + 1])
    place(next_near, ARGV[at], ARGV[at + 1])
  end
end
return {'OK'}
"""
)

# ARGV: incarnation, embedder, dimension, version that there must be. Answers with 1 if it was so. What is staged goes:
# its vectors are of the other embedder.
FINISH_REEMBED = _of_bank(
    _NEXT
    + """
if redis.call('HGET', meta, 'version') ~= ARGV[4] then return {'OK', 0} end
redis.call('HDEL', meta, 'next_embedder')
for _, id in ipairs(redis.call('ZRANGE', staged, 0, -1)) do redis.call('HDEL', entries, id) end
redis.call('UNLINK', staged, vectors, near)
if redis.call('EXISTS', next_vectors) == 1 then redis.call('RENAME', next_vectors, vectors) end
if redis.call('EXISTS', next_near) == 1 then redis.call('RENAME', next_near, near) end
redis.call('HSET', meta, 'embedder', ARGV[2], 'dim', ARGV[3])
return {'OK', 1}
"""
)
