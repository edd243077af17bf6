"""What is put down in a bank out of sight, and comes in sight together: Lua scripts, for chunks of documents, and for
vectors of another embedder. `bank_script_base` has their keys and their answers."""

from cache_store.bank_script_base import of_bank

# ARGV: incarnation, embedder, dimension, most entries, now in ms, since when what is staged stays, (id, entry,
# vector)...
STAGE = of_bank("""
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
COMMIT_DOCUMENT = of_bank("""
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
HAS_DOCUMENT = of_bank("""
local row = redis.call('HGET', documents, ARGV[2]) or ''
if row:sub(1, 32) ~= ARGV[3] then return {'OK', 0} end
for at = 33, #row, 32 do
  if redis.call('HEXISTS', entries, row:sub(at, at + 31)) == 0 then return {'OK', 0} end
end
return {'OK', 1}
""")

# ARGV: incarnation, embedder.
BEGIN_REEMBED = of_bank("""
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
PUT_VECTORS = of_bank(
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
FINISH_REEMBED = of_bank(
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
