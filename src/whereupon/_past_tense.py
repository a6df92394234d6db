"""The rule for the names of events: a name says what has happened.

English morphology is decided by rules first (``-ed``, ``-ing``, re-/un-/over- before an irregular verb) and
by lists only where rules end. A word that neither knows, in English or in another language, is the author's
to declare: ``participle=``.
"""

import re
from collections.abc import Container, Iterator, Sequence


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _paired(text: str) -> dict[str, str]:
    return {left: right for left, _, right in (pair.partition(":") for pair in text.split())}


_IRREGULAR = _paired(
    """
    arise:arisen awake:awoken be:been bear:borne beat:beaten become:become befall:befallen beget:begotten
    begin:begun behold:beheld bend:bent beseech:besought beset:beset bet:bet bid:bid bind:bound bite:bitten
    bleed:bled blow:blown break:broken breed:bred bring:brought broadcast:broadcast build:built burst:burst
    buy:bought cast:cast catch:caught choose:chosen cling:clung cost:cost creep:crept cut:cut deal:dealt
    dig:dug do:done draw:drawn drink:drunk drive:driven eat:eaten fall:fallen feed:fed feel:felt fight:fought
    find:found flee:fled fling:flung fly:flown forbear:forborne forbid:forbidden forecast:forecast
    forego:foregone foresee:foreseen foretell:foretold forget:forgotten forgive:forgiven forgo:forgone
    forsake:forsaken forswear:forsworn freeze:frozen get:got give:given go:gone grind:ground grow:grown
    hang:hung have:had hear:heard hide:hidden hit:hit hold:held hurt:hurt keep:kept know:known lay:laid
    lead:led leave:left lend:lent let:let light:lit lose:lost make:made mean:meant meet:met offset:offset
    overcome:overcome pay:paid partake:partaken put:put quit:quit read:read rend:rent reset:reset rid:rid
    ride:ridden ring:rung rise:risen run:run say:said see:seen seek:sought sell:sold send:sent set:set
    sew:sewn shake:shaken shed:shed shine:shone shoot:shot show:shown shrink:shrunk shut:shut sing:sung
    sink:sunk sit:sat slay:slain sleep:slept slide:slid sling:slung slink:slunk slit:slit smite:smitten
    sow:sown speak:spoken speed:sped spend:spent spin:spun spit:spat split:split spread:spread spring:sprung
    stand:stood steal:stolen stick:stuck sting:stung strew:strewn stride:stridden strike:struck string:strung
    strive:striven sunset:sunset swear:sworn sweep:swept swell:swollen swim:swum swing:swung take:taken
    teach:taught tear:torn tell:told think:thought throw:thrown thrust:thrust tread:trodden typeset:typeset
    undergo:undergone understand:understood undertake:undertaken uphold:upheld upset:upset wake:woken
    wear:worn weave:woven wed:wed weep:wept win:won wind:wound withdraw:withdrawn withhold:withheld
    withstand:withstood wring:wrung write:written
    """
)
# Second participles, British and archaic forms, and compounds whose first part is no prefix below.
_PARTICIPLES = frozenset(_IRREGULAR.values()) | _listed(
    """
    bereft born burnt clad dreamt dwelt forgot gotten inlaid inset interwoven hamstrung handwritten hewn
    knelt knit leant leapt learnt mown proven retrofit sawn shaven shorn shod simulcast smelt spelt spilt
    spoilt stricken sublet telecast thriven bidden waylaid webcast bespoken browbeaten ghostwritten lain
    proofread riven typewritten wrought
    """
)
# Past tense all the same: PriceFell, SubscriptionBecameActive.
_SIMPLE_PASTS = _listed(
    """
    arose awoke ate became befell began blew bore broke came chose did drank drew drove fell flew forbade
    forgave forgot forsook froze gave grew hid knew oversaw ran rang rode rose sank sang shook shrank spoke
    sprang stole strode strove swore swam threw took tore trod underwent undertook went withdrew woke wore
    wove wrote
    """
)
_PASTS = _PARTICIPLES | _SIMPLE_PASTS
# "SubscriptionBecameActive": what follows these is an adjective, not an object.
_LINKING = _listed("became become went gone fell fallen grew grown stayed remained")
# Words that begin with a prefix below and continue like an irregular verb without being one.
_NOT_PREFIXED = _listed(
    """
    mistake outcast outcome outfit outlet output outset overcast overdraft overview present relay relent
    report resort unit
    """
)
_PREFIXES = ("re", "un", "over", "under", "out", "mis", "with", "pre", "fore")

# Words in -eed are not participles (need, feed, speed, exceed, succeed …) but for these.
_PARTICIPLES_IN_EED = _listed(
    """
    agreed disagreed preagreed decreed freed guaranteed kneed pedigreed refereed teed treed
    """
)
_ONLY_ENDING_IN_ED = _listed(
    """
    alfred bed bedspread biped bloodshed bobsled childbed cred crooked deathbed dogged embed flatbed fred
    hatred hotbed hundred imbed indeed infrared jagged kindred manfred mohammed moped naked newlywed
    parallelepiped quadruped ragged red riverbed roadbed rugged sacred sched seedbed shred sled sickbed
    sunbed ted testbed unembed waterbed watershed wicked winifred wretched zed
    """
)
_NOUNS_IN_ING = _listed(
    """
    anything accounting banking beijing being billing boeing briefing building ceiling clothing darling
    engineering evening everything heading herring hosting housing landing marketing messaging lightning
    meeting morning nothing offering offspring pricing pudding setting sibling something sterling thing
    training viking warning wedding
    """
)
_VOWELS = frozenset("aeiouy")

# What may follow the participle: UserLoggedIn, MoneySentToBank, OrderShippedLate. Adverbs in -ly: no list.
_TAIL_WORDS = _listed(
    """
    about above across after again against ahead along alongside among anew apart around as aside at away
    back because before behind below beneath beside between beyond by despite down due during early elsewhere
    forever for forth forward forwards from further halfway here home in inside instead into late later live
    long more near nearby next of off offline on once online onto out outside over overnight past per
    permanent prior since so sooner through throughout till to today together too toward towards twice under
    until up upon upstairs upwards via when where while with within without
    """
)
_LONGEST_TAIL = 5
_NO_ADVERBS = _listed(
    """
    ally anomaly apply assembly belly bully comply duopoly family fly italy jelly lily monopoly multiply
    rally rely reply resupply supply tally
    """
)
# In SignUpUser these belong to the verb, and move with it: UserSignedUp.
_VERB_PARTICLES = _listed("away back down in off on out over up")
# In SendMoneyToBank the tail begins at one of these: MoneySentToBank.
_OBJECT_ENDS_AT = _listed("as at by for from into onto to via with")

# Verbs that are hardly ever nouns: as the first word a command, as the last one the present tense.
_VERBS = _listed(
    """
    accept acknowledge acquire activate adapt add adjust admit adopt aggregate align allocate allow amend
    announce anonymise anonymize append apply appoint approve arise arrange ask assemble assess assign
    associate attach attend authenticate authorise authorize await ban become begin bind bring buy calculate
    cancel capture categorise categorize choose classify clean collect combine commence commit compile
    complete compute configure confirm connect consolidate construct consume convert correct create
    deactivate decide decode decrypt deduct deduplicate define delegate delete deliver deny deploy deprecate
    dequeue deregister derive destroy detach detect determine disable disburse discard disconnect discover
    dismiss dispatch distribute eject elect eliminate embed emit enable encode encrypt enforce engage enqueue
    enrich enrol enroll ensure enter erase escalate establish evaluate evict examine exceed exclude execute
    expand expel expire explain extend extract fail fetch finalise finalize find finish flush forbid forget
    forgive fulfil fulfill gather generate get give go grant happen hide identify ignore impersonate
    implement include increment inform inherit initialise initialize initiate inject insert inspect install
    instantiate integrate invalidate invoke join keep learn lend let liquidate locate lose make maintain
    manage migrate modify negotiate nominate normalise normalize notify obtain occur offboard omit onboard
    optimise optimize organise organize parse participate pay perform permit persist populate postpone prefer
    prepare prevent proceed promote propose prove provide provision publish purge qualify reach reactivate
    rebuild recalculate receive recognise recognize recommend reconcile reconnect recover redeem redirect
    redo reduce refer refine register reinstate reject relocate remember remind remove rename render renew
    reopen repay replace replenish replicate repossess rescind reschedule reserve resolve respond restore
    restrict resubmit resume retain retire retrieve reveal revert revise revoke satisfy save schedule see
    seek select sell send serialise serialize serve settle simulate solve specify submit subscribe succeed
    suggest supersede suspend synchronise synchronize take teach tell terminate throw toggle transform
    translate transmit truncate try unassign unban unblock unbind undelete undergo undo unfreeze unhide
    uninstall unlink unlock unmute unpin unpublish unregister unsubscribe unsuspend update upgrade validate
    verify withdraw withhold write
    """
)
# Verbs that are nouns as well: a command only where nothing in the rest of the name says otherwise.
_VERBS_AND_NOUNS = _listed(
    """
    abort alert archive attempt audit backfill block book boost broadcast build cast change charge check
    claim close copy credit cut debit debug decline decrease delay demote deposit dispute download draft draw
    drive drop duplicate edit exchange exit export feed fix flag flip forecast forward freeze halt handle
    hire hold import increase invite issue lead leave lift link load lock log mark match measure mention
    merge monitor move mute nudge offer open pack park patch pause pin ping place poll post preview print
    probe process prompt pull purchase push put query quote raise rank rate read recall reclaim refresh
    refund refuse reissue relay release repair replay request reset restart retry return reverse review
    reward rotate run scan score seal search seed set share shift ship show shred sign skip snooze sort split
    spread start stop store stream surrender swap switch sync tag track trade transfer trigger trim upload
    upvote downvote use view visit void vote wake warn watch wrap
    """
)
# Those of them that name the act itself: PriceChange says which change happened once it is PriceChanged.
_ACTS = _listed(
    """
    abort attempt change close decline decrease delay dispute download edit exchange exit export freeze halt
    import increase merge move purchase reclaim recall refresh refund reissue release replay request restart
    retry return reverse review search ship start stop surrender switch sync transfer upload visit
    """
)
# Verbs, if they are no others, when a particle follows: LogInUser, RollBackRelease.
_VERBS_WITH_PARTICLE = _listed(
    """
    back break call carry cash check clean clear close cut hand kick lay lock log opt pay phase pick roll
    scale set shut sign switch take time top turn wind write
    """
)
_DOUBLING = _listed(
    """
    abhor admit ban bar beg blog blur cancel chat chop clip commit compel control debug defer dim dispel drag
    drop embed emit enrol equip excel expel flag flip flop format fulfil grab handicap infer jam label lap
    log map model occur omit pad patrol permit pin pip plan plug pop prefer program propel quiz rebel rebut
    recur refer regret remit rip rob scan scrap ship shop shred signal skip slip snap spot stab stem step
    stop strap strip stub submit sum swap tag tap tip top total transfer transmit travel trap trim unplug
    unwrap unzip wrap zap zip
    """
)
# Nouns as much as participles: CreateForecast, ScheduleRun. After a verb they are its object.
_INVARIABLE_NOUNS = _listed(
    """
    bet bid broadcast burst cast cost cut forecast hit offset preset put reset rerun run set split spread
    sunset upset webcast
    """
)
_LOOK_LIKE_THEIR_VERB = frozenset(verb for verb, participle in _IRREGULAR.items() if verb == participle)

_PHRASAL_NOUNS = _paired(
    """
    backup:BackedUp checkin:CheckedIn checkout:CheckedOut cleanup:CleanedUp login:LoggedIn logon:LoggedOn
    logout:LoggedOut logoff:LoggedOff payout:PaidOut payoff:PaidOff rollback:RolledBack rollout:RolledOut
    setup:SetUp shutdown:ShutDown signin:SignedIn signout:SignedOut signup:SignedUp takeover:TakenOver
    """
)
# Without a participle (after the colon) the noun itself is what succeeded: PaymentSucceeded.
_ACTION_NOUNS = _paired(
    """
    acceptance:Accepted activation:Activated allocation:Allocated approval:Approved assignment:Assigned
    authentication:Authenticated authorisation:Authorised authorization:Authorized calculation:Calculated
    cancellation:Cancelled completion:Completed confirmation:Confirmed connection:Connected
    conversion:Converted creation:Created deactivation:Deactivated deletion:Deleted delivery:Delivered
    deployment:Deployed disconnection:Disconnected enrolment:Enrolled enrollment:Enrolled execution:Executed
    expiration:Expired expiry:Expired failure:Failed import: export: installation:Installed
    migration:Migrated payment: publication:Published reconciliation:Reconciled redemption:Redeemed
    registration:Registered rejection:Rejected removal:Removed renewal:Renewed resolution:Resolved
    restoration:Restored revocation:Revoked selection:Selected shipment: submission:Submitted
    success:Succeeded suspension:Suspended synchronisation:Synchronised synchronization:Synchronized
    termination:Terminated transmission:Transmitted validation:Validated verification:Verified withdrawal:
    """
)
# EmailWillBeSent, UserDidRegister: left out of a suggested name.
_AUXILIARIES = _listed("are be being can did does is may might must shall should to will")
_NEGATIONS = _listed("about cannot never no not")

_BRANDS = frozenset({("O", "Auth"), ("Linked", "In"), ("Pay", "Pal")})
# URLs, OCRd, OCRed, IPv6 · 2nd · HTTP before Request, 2FA before Enabled, V2 · Request · else each by itself.
_WORD = re.compile(
    r"[A-Z\d]+[A-Z](?:s|d|ed|v)(?![a-z])|[A-Z\d]*\d[a-z]+|[A-Z\d]+(?![a-z])|[A-Z]?[a-z]+|.",
    re.ASCII | re.DOTALL,
)

_SAYS = "an event's name says what has happened"
_END = "End the name with a past participle, as in OrderShipped."


def problem_with(name: str, participle: str | None = None) -> str | None:
    """Why an event class may not be called ``name``, with the way out; ``None`` when it may.

    ``participle`` is the author's own past participle (``"Verworfen"``): a name that contains it is fine. A
    suggested name stands in double quotes after ``Call it`` and has itself no problem, given ``participle``.
    """
    bare = name.strip("_")
    hidden = name[: len(name) - len(name.lstrip("_"))]
    malformed = _problem_of_form(name, hidden, bare, participle)
    if malformed:
        return malformed
    words = _words(bare)
    if participle is not None:
        if _contains(words, participle):
            return None
        return _problem_of_participle(name, hidden, bare, participle)
    words = _without_event(words)
    if not words:
        return f"{name} does not say what has happened. {_END}"
    version = _version_at_the_end(words)
    if version:
        return _problem_of_version(name, hidden, *version)
    return None if _fine(words) else _problem_of_tense(name, hidden, words)


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────


def _words(name: str) -> list[str]:
    """CamelCase words; in a script without capitals every character is a word of its own."""
    if name.isascii():
        words = _WORD.findall(name)
    else:
        words = [name[slice(*match.span())] for match in _WORD.finditer("".join(map(_in_ascii, name)))]
    for index in range(len(words) - 2, -1, -1):
        if (words[index], words[index + 1]) in _BRANDS:
            words[index : index + 2] = [words[index] + words[index + 1]]
    return words


def _in_ascii(character: str) -> str:
    """A character of the same kind, so that one expression splits every alphabet."""
    if character.isascii():
        return character
    if character.isupper() or character.istitle():
        return "A"
    if character.islower():
        return "a"
    return "0" if character.isdecimal() else "_"


def _without_event(words: list[str]) -> list[str]:
    if words and words[-1] == "Event":
        return words[:-2] if words[-2:-1] in (["Domain"], ["Integration"]) else words[:-1]
    return words


def _contains(words: Sequence[str], participle: str) -> bool:
    if not participle.isascii():
        # Python normalises identifiers but not strings: "ö" typed as two characters would never be found.
        from unicodedata import normalize

        participle = normalize("NFKC", participle)
    wanted = [word.casefold() for word in _words(participle)]
    have = [word.casefold() for word in words]
    width = len(wanted)
    return width > 0 and any(have[at : at + width] == wanted for at in range(len(have) - width + 1))


# ── Grammar ─────────────────────────────────────────────────────────────────────────────────────────────


def _remainders(word: str) -> Iterator[tuple[str, str]]:
    for prefix in _PREFIXES:
        if word.startswith(prefix) and word not in _NOT_PREFIXED:
            yield prefix, word[len(prefix) :]


def _in(words: Container[str], word: str) -> bool:
    """Whether ``word`` is one of these, itself or behind a prefix."""
    return word in words or (word.startswith(_PREFIXES) and any(rest in words for _, rest in _remainders(word)))


def _is_past(word: str) -> bool:
    if len(word) > 1 and word.isupper():
        return False  # LED, RED: an acronym
    if len(word) > 3 and word[-1] == "d" and word[:-1].removesuffix("e").isupper():
        return True  # OCRd, SMSed
    lower = word.lower()
    if lower.endswith("eed"):
        return lower in _PARTICIPLES_IN_EED
    if lower.endswith("ed") and len(lower) > 3 and not _VOWELS.isdisjoint(lower[:-2]):
        return lower not in _ONLY_ENDING_IN_ED
    return _in(_PASTS, lower)


def _starts_tail(word: str) -> bool:
    lower = word.lower()
    return lower in _TAIL_WORDS or (len(lower) > 4 and lower.endswith("ly") and lower not in _NO_ADVERBS)


def _fine(words: Sequence[str]) -> bool:
    """Whether they end with a past tense, or with one and its tail."""
    if _is_past(words[-1]):
        lower = [word.lower() for word in words]
        if len(lower) > 1 and lower[-2] in ("be", "being"):
            return "could" in lower or lower[-3:-2] == ["well"]
        object_of_command = lower[-1] in _INVARIABLE_NOUNS and len(words) > 1  # CreateForecast
        return not (object_of_command and _in(_VERBS, lower[0]))
    for at in range(max(0, len(words) - 1 - _LONGEST_TAIL), len(words) - 1):
        if not _is_past(words[at]):
            continue
        lower_word = words[at].lower()
        if at == 0 and lower_word in _LOOK_LIKE_THEIR_VERB:
            continue  # SetToZero, ReadFromFile
        if at > 0 and words[at - 1] in ("Be", "Being"):
            continue
        if _starts_tail(words[at + 1]):
            return True
        if at > 0 and lower_word in _LINKING and len(words) - 1 - at <= 2:
            return True
    return False


def _participle_of(verb: str) -> str:
    """Of a verb that stands in one of the lists above, with or without a prefix."""
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb in _DOUBLING:
        return verb + verb[-1] + "ed"
    for prefix, rest in _remainders(verb):
        if rest in _IRREGULAR or rest in _DOUBLING:
            return prefix + _participle_of(rest)
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2:-1] not in _VOWELS:
        return verb[:-1] + "ied"
    return verb + "ed"


def _participle_of_progressive(word: str) -> str | None:
    """``registering`` → ``registered``; ``None`` when it merely ends so (``string``, ``meeting``)."""
    stem = word[:-3]
    if not word.endswith("ing") or len(stem) < 2 or word in _NOUNS_IN_ING or _VOWELS.isdisjoint(stem):
        return None
    bases = [stem, stem + "e"]
    if stem[-1] == stem[-2]:
        bases.append(stem[:-1])
    for base in bases:
        if _in(_IRREGULAR, base):
            return _participle_of(base)
    if stem.endswith("ee"):
        return stem + "d"
    # Doubled consonants and dropped e's are already as they are before -ed.
    return stem[:-1] + "ied" if stem.endswith("y") and stem[-2] not in _VOWELS else stem + "ed"


def _verb_behind(word: str, verbs: frozenset[str]) -> str | None:
    """The verb of a base form or a third person: ``register``, ``registers``, ``retries``."""
    if _in(verbs, word):
        return word
    if word.endswith("s") and not word.endswith("ss"):
        bases = [word[:-1]]
        if word.endswith("es"):
            bases.append(word[:-2])
        if word.endswith("ies"):
            bases.append(word[:-3] + "y")
        return next((base for base in bases if _in(verbs, base)), None)
    return None


# ── Problems, each with its way out ─────────────────────────────────────────────────────────────────────


def _fault_of_form(bare: str) -> str | None:
    if "_" in bare:
        return "is written with underscores"
    if bare[:1].islower():
        return "begins with a small letter"
    # Longer than most acronyms, and a participle once it is written as a word.
    return "is written in capitals" if len(bare) > 4 and bare.isupper() and _is_past(bare.capitalize()) else None


def _problem_of_form(name: str, hidden: str, bare: str, participle: str | None) -> str | None:
    if not bare:
        return f"The name {name!r} has no word in it. {_END}"
    reason = _fault_of_form(bare)
    if reason is None:
        return None
    parts = [part for part in bare.split("_") if part]
    if bare.isupper() or bare.islower():
        camel = hidden + "".join(part.capitalize() for part in parts)
    else:
        camel = hidden + "".join(part[0].upper() + part[1:] for part in parts)
    suggestion = None
    if camel != name and camel.isidentifier():
        problem = problem_with(camel, participle)
        suggestion = camel if problem is None else _suggested_in(problem)
    if suggestion:
        return f'{name} {reason}; events are named in CamelCase. Call it "{suggestion}".'
    return f"{name} {reason}; events are named in CamelCase and end with a past participle, as in OrderShipped."


def _suggested_in(problem: str) -> str | None:
    _, found, rest = problem.partition('Call it "')
    return rest.partition('"')[0] if found else None


def _problem_of_participle(name: str, hidden: str, bare: str, participle: str) -> str:
    reason = f'{name} declares participle="{participle}", which is not among the words of its name.'
    if problem_with(bare) is None:
        return f"{reason} The name is fine without: leave participle= out."
    suggestion = hidden + bare + participle[:1].upper() + participle[1:]
    bare = suggestion.strip("_")
    if suggestion.isidentifier() and _fault_of_form(bare) is None and _contains(_words(bare), participle):
        return f'{reason} Call it "{suggestion}", or declare the word that is.'
    return f"{reason} Declare the word of the name that is a past participle, as it is written there."


def _version_at_the_end(words: list[str]) -> tuple[list[str], str] | None:
    """The words before a version, and its number: of ``OrderShippedV2``, ``…2`` or ``…Version2``."""
    number = words[-1].lstrip("Vv")
    rest = words[:-1]
    if not rest or not (number.isascii() and number.isdecimal()) or len(words[-1]) - len(number) > 1:
        return None
    before = rest[-1]
    if number != words[-1]:
        return None if before.lower() in _OBJECT_ENDS_AT else (rest, number)  # SchemaMigratedToV2
    if before == "Version" and len(rest) > 1:
        return rest[:-1], number
    if before.endswith("v") and _is_past(before[:-1]):
        return [*rest[:-1], before[:-1]], number
    counts = _fine(words) and not (len(number) == 1 and _starts_tail(before))  # UserBornIn1970, not UserLoggedIn2
    return None if counts else (rest, number)


def _problem_of_version(name: str, hidden: str, rest: list[str], number: str) -> str:
    number = number.lstrip("0") or "1"
    unversioned = hidden + "".join(rest)
    problem = problem_with(unversioned)
    suggestion = unversioned if problem is None else _suggested_in(problem)
    reason = f"{name} carries a version, which is no part of what happened."
    if suggestion:
        return f'{reason} Call it "{suggestion}" and say: class {suggestion}(DomainEvent, version={number}).'
    return f"{reason} Leave it out, end with a past participle and declare version={number} beside DomainEvent."


def _problem_of_tense(name: str, hidden: str, words: list[str]) -> str:
    lower = [word.lower() for word in words]
    last = words[-1]
    command = f"{name} reads as a command; {_SAYS}."

    with_particle = len(words) > 1 and lower[0] in _VERBS_WITH_PARTICLE and lower[1] in _VERB_PARTICLES
    if with_particle or (len(words) > 1 and _in(_VERBS, lower[0])):
        return command + _call_it(hidden, _command_turned(words))

    if lower[-2:-1] in (["be"], ["being"]):
        return f"{name} is still to happen; {_SAYS}." + _call_it(hidden, _told_as_past(words[:-1], last, []))

    ends = [len(words), *(at for at in range(1, len(words)) if _starts_tail(words[at]))]
    for end in ends:
        tail = words[end:]
        participle = _participle_of_progressive(lower[end - 1])
        if participle:
            reason = f"{name} is in the present progressive; {_SAYS}."
            return reason + _call_it(hidden, _told_as_past(words[: end - 1], participle, tail))
    for end in ends:
        tail = words[end:]
        phrasal = bool(tail) and tail[0].lower() in _VERB_PARTICLES
        verb = _verb_behind(lower[end - 1], _VERBS | _VERBS_WITH_PARTICLE if phrasal else _VERBS)
        if verb:
            reason = f"{name} is in the present tense; {_SAYS}."
            return reason + _call_it(hidden, _told_as_past(words[: end - 1], _participle_of(verb), tail))

    if len(words) > 1 and _in(_VERBS_AND_NOUNS, lower[0]):
        return command + _call_it(hidden, _command_turned(words)) + _declare(name, last)

    verb = _verb_behind(lower[-1], _ACTS)
    if verb:
        reason = f"{name} ends in {last}, a noun or the present tense; {_SAYS}."
        return reason + _call_it(hidden, _told_as_past(words[:-1], _participle_of(verb), []))

    subject = f"{name} ends in {last}, which" if len(words) > 1 else name
    noun = f"{subject} is not known as a past participle; {_SAYS}."
    if lower[-1] in _PHRASAL_NOUNS and len(words) > 1:
        return noun + _call_it(hidden, [*words[:-1], _PHRASAL_NOUNS[lower[-1]]]) + _declare(name, last)
    if lower[-1] in _ACTION_NOUNS:
        entity_first = len(words) > 1 and _ACTION_NOUNS[lower[-1]]
        turned = [*words[:-1], entity_first] if entity_first else [*words, "Succeeded"]
        return noun + _call_it(hidden, turned) + _declare(name, last)
    for word in reversed(words[1:-1]):
        if _is_past(word) and word.lower() not in _LOOK_LIKE_THEIR_VERB:
            reason = f'{name} goes on after "{word}", to {last}: it reads as a thing rather than as what happened.'
            return f'{reason} End it with "{word}", or keep it and declare {_declared(name, word)}.'
    return noun + _call_it(hidden, None) + _declare(name, _in_one(words))


def _call_it(hidden: str, words: Sequence[str] | None) -> str:
    """The sentence that suggests a name, if these words make one that is fine."""
    if words:
        suggestion = hidden + "".join(words)
        split = _words("".join(words))
        well_formed = suggestion.isidentifier() and not split[0][0].islower()
        if well_formed and _version_at_the_end(split) is None and _fine(split):
            return f' Call it "{suggestion}".'
    return f" {_END}"


def _declare(name: str, word: str) -> str:
    return f' If "{word}" is itself a past participle, declare it: {_declared(name, word)}.'


def _declared(name: str, word: str) -> str:
    return f'class {name}(DomainEvent, participle="{word}")'


def _in_one(words: Sequence[str]) -> str:
    """The last word; in a script without capitals, all that follows the last word of another."""
    start = len(words) - 1
    while start > 0 and _in_ascii(words[start][0]) == _in_ascii(words[start - 1][0]) == "_":
        start -= 1
    return "".join(words[start:])


def _command_turned(words: Sequence[str]) -> list[str]:
    """``SendMoneyToBank`` → ``MoneySentToBank``, ``SignUpUser`` → ``UserSignedUp``."""
    verb, rest = words[0].lower(), list(words[1:])
    if verb == "get":
        verb = "retrieve"  # nobody says AccountGot
    particle = []
    if verb in _VERBS_WITH_PARTICLE and rest[0].lower() in _VERB_PARTICLES:
        particle.append(rest.pop(0))
    ends_at = next((at for at, word in enumerate(rest) if word.lower() in _OBJECT_ENDS_AT), len(rest))
    return [*rest[:ends_at], _participle_of(verb).capitalize(), *particle, *rest[ends_at:]]


def _told_as_past(subject: Sequence[str], participle: str, tail: Sequence[str]) -> list[str] | None:
    """Without the auxiliaries before the verb; ``None`` where they say that it did not happen."""
    end = len(subject)
    while end > 0 and subject[end - 1].lower() in _AUXILIARIES | _NEGATIONS:
        if subject[end - 1].lower() in _NEGATIONS:
            return None
        end -= 1
    return [*subject[:end], participle.capitalize(), *tail]
