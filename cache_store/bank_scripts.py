"""What happens to a bank and its entries in Redis: Lua scripts. `bank_script_base` has their keys and their answers."""

from cache_store.bank_script_base import of_bank
from cache_store.record_scripts import script

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

READ = of_bank("return {'OK', record()}")

DELETE = of_bank("""
local had = count()
redis.call('UNLINK', unpack(KEYS))
return {'OK', had}
""")

# ARGV: incarnation, embedder, dimension, most entries, who stands, number of entries, (id, entry, vector)..., (loser,
# winner)... Answers with 1 for each that is new.
ADD = of_bank("""
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

# ARGV: -, incarnation, embedder, version read up to, version when that was begun, most changes. Answers with the bank,
# where its reader is now, whether that is from nothing and whether it is all, what is gone, and (id, entry, vector,
# superseded by, recalls, last)...
CHANGES = of_bank("""
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
ENTRIES = of_bank("""
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
VECTORS = of_bank("""
local refused = foreign(ARGV[2])
if refused then return refused end
local kept = {}
for at = 3, #ARGV do kept[at - 2] = in_sight(ARGV[at]) and redis.call('HGET', vectors, ARGV[at]) or '' end
return {'OK', kept}
""")

# ARGV: incarnation, ids... Answers with (recalls, last) of each.
USES = of_bank("""
local uses = {}
for at = 2, #ARGV do
  uses[#uses + 1] = redis.call('HGET', recalls, ARGV[at]) or '0'
  uses[#uses + 1] = redis.call('HGET', last, ARGV[at]) or '0'
end
return {'OK', uses}
""")

# ARGV: incarnation, (id, recalls more, last in ms)...
ADD_USES = of_bank("""
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
REMOVE = of_bank("""
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
