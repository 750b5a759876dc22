/*
 * An anchor, its workers, and one of each thing that can befall them: a roll-out that settles or is taken back, an
 * upgrade of the anchor, a takeover by another one, a stop, and deaths at any moment.
 *
 * This is the second model of a restart. The first one (tests/handoff/test_protocol_exploration.py) walks through the
 * protocol's own tables, for one chain of processes. This one is written anew from the design, and knows several slots
 * and their anchor. What it leaves out: time (a limit may always be over), bytes, and what connections do.
 *
 * test_anchor_model.py lets spin prove the claims at the end. With one of the DEFECT_ names defined, the model makes
 * a mistake, and a claim has to fail. With one of STOPS, TAKEOVER and ANCHOR_DIES, more befalls the service.
 */

#ifndef DEATHS
#define DEATHS 1 /* how many processes are killed, of those that the scenario has */
#endif
#ifndef SLOTS
#define SLOTS 1
#endif

mtype:life = { Absent, Starting, Open, Paused, Leaving, Gone };
mtype:word = { Ready, Commit, Serving, Settled, Abort, Recall, Returned, Restart, Settle, Revert, Stop, Served, Failed,
               Over };

/* The processes. A slot has an old worker, its successor, and the one that the anchor starts where both are gone. */
mtype:life anchor = Open;
mtype:life newcomer = Absent; /* another anchor, which takes the service over */
mtype:life old[SLOTS] = Open;
mtype:life new[SLOTS] = Absent;
mtype:life fresh[SLOTS] = Absent;

chan order[SLOTS] = [3] of { mtype:word }; /* from the anchor to the old worker */
chan said[SLOTS] = [4] of { mtype:word };  /* and back */
chan down[SLOTS] = [3] of { mtype:word };  /* from the old worker to its successor */
chan up[SLOTS] = [3] of { mtype:word };    /* and back */

/* What was decided or has happened. */
bool condemned[SLOTS]; /* the successor is being ended by force */
bool broken[SLOTS];    /* the new code has failed by itself */
bool aborted[SLOTS];   /* the successor was told that it is not wanted */
bool killed[SLOTS];    /* the successor was killed */
bool killed_old[SLOTS];
bool settled[SLOTS];   /* the old worker will never accept again */
bool is_reaped[SLOTS] = true; /* the last one that the anchor has started is no process any more */
bool stopping = false; /* the service is being stopped */
bool taken_back = false;
bool final = false;    /* the roll-out has settled */
bool holds_anchor = true, holds_newcomer = false;
bool acts_newcomer = false;
byte deaths = DEATHS;

#define is_alive(x) (x != Absent && x != Gone)
#define accepts(i) ((old[i] == Open) + (new[i] == Open) + (fresh[i] == Open))
#define LAST (SLOTS - 1)
#define is_empty(i) (!is_alive(old[i]) && !is_alive(new[i]) && !is_alive(fresh[i]))
#define all_are_gone (is_empty(0) && is_empty(LAST))
#define has_anchor (anchor == Open || acts_newcomer)
#define is_vacant(i)                                                                                                   \
    (!(old[i] == Open || old[i] == Paused) && !(new[i] == Starting || new[i] == Open) &&                               \
     !(fresh[i] == Starting || fresh[i] == Open))

/* A worker that leaves finishes its connections; the exit deadline sees that it ends (G10). */
inline leave(worker)
{
    worker = Leaving;
#ifdef DEFECT_NO_EXIT_DEADLINE
    if
    :: true -> worker = Gone
    :: true -> false
    fi
#else
    worker = Gone
#endif
}

/*
 * The predecessor of one slot. The life of a process that was killed is Gone, and that interrupts whatever it does.
 */
proctype Old(byte i)
{
    {
        skip;
serving:
        if
        :: order[i]?Restart ->
            atomic { new[i] = Starting; run New(i) }
        :: order[i]?Stop -> goto leaving
        :: order[i]?Revert -> goto serving /* of an order that it has not obeyed */
        :: order[i]?Settle -> goto serving
        :: !has_anchor && empty(order[i]) -> goto leaving
        fi;
        /* Until the commit it accepts, and any failure costs nothing (G4). */
        if
        :: up[i]?Ready -> old[i] = Paused
        :: new[i] == Gone && empty(up[i]) -> said[i]!Failed; goto serving
        :: order[i]?Revert -> atomic { down[i]!Abort; aborted[i] = true }; condemned[i] = true; goto aborting
        :: order[i]?Stop -> atomic { down[i]!Abort; aborted[i] = true }; condemned[i] = true; goto stopping_here
        :: !has_anchor && empty(order[i]) -> atomic { down[i]!Abort; aborted[i] = true }; condemned[i] = true; goto stopping_here
        fi;
        down[i]!Commit;
        /* From here on the successor may accept for as long as it lives (G2). */
        if
        :: up[i]?Serving -> said[i]!Served
        :: new[i] == Gone && empty(up[i]) -> goto resumed
        :: condemned[i] = true; goto reverting /* the time is over */
        :: order[i]?Stop -> down[i]!Stop; goto leaving
        :: !has_anchor && empty(order[i]) -> down[i]!Stop; goto leaving
        fi;
probation:
        if
        :: order[i]?Settle ->
            atomic {
                if
#ifndef DEFECT_SETTLES_WITHOUT_A_LOOK
                :: new[i] == Gone && empty(up[i]) -> goto resumed
#endif
                :: else -> settled[i] = true
                fi
            };
            down[i]!Settled;
            said[i]!Over;
            goto leaving
        :: order[i]?Revert -> down[i]!Recall
        :: new[i] == Gone && empty(up[i]) -> goto resumed
        :: order[i]?Stop -> down[i]!Stop; goto leaving
        :: !has_anchor && empty(order[i]) -> down[i]!Stop; goto leaving
        fi;
        /* The way back needs the successor's word that it accepts no more, or its death. */
        if
        :: up[i]?Returned -> goto resumed
        :: new[i] == Gone && empty(up[i]) -> goto resumed
        :: condemned[i] = true /* the time is over */
        :: order[i]?Stop -> down[i]!Stop; goto leaving
        fi;
reverting:
#ifdef DEFECT_RESUMES_BEFORE_DEATH
        skip;
#else
        new[i] == Gone;
#endif
resumed:
#ifdef DEFECT_DOES_NOT_RESUME
        goto leaving;
#endif
        old[i] = Open;
        said[i]!Failed;
        goto serving;
aborting:
        new[i] == Gone;
        said[i]!Failed;
        goto serving;
stopping_here:
        new[i] == Gone;
leaving:
        leave(old[i])
    } unless { old[i] == Gone };
    old[i] = Gone
}

/* The successor of one slot. */
proctype New(byte i)
{
    bool fails; /* whether its code is going to fail; what may always fail would have to, in the end */
    {
        if
        :: fails = true
        :: fails = false
        fi;
        /* The application prepares itself, which may fail. */
        if
        :: fails -> broken[i] = true; goto ended
        :: up[i]!Ready
        :: down[i]?Abort -> goto ended
        /* The sockets lie in the channel before it exists: a death during its import costs nothing (G6). */
        :: old[i] == Gone && empty(down[i]) -> goto promoted
        fi;
        if
        :: down[i]?Commit -> skip
        :: down[i]?Abort -> goto ended
        :: old[i] == Gone && empty(down[i]) -> goto promoted
        fi;
        new[i] = Open;
        up[i]!Serving;
        if
        :: down[i]?Settled -> goto established
        :: down[i]?Recall ->
            new[i] = Leaving;
            up[i]!Returned;
            goto ended
        :: down[i]?Stop -> goto ended
        :: old[i] == Gone && empty(down[i]) -> goto established
        :: fails -> broken[i] = true; goto ended
        fi;
promoted:
#ifdef DEFECT_NOBODY_IS_PROMOTED
        goto ended;
#endif
        new[i] = Open;
established:
        !has_anchor || stopping;
ended:
        leave(new[i])
    } unless { new[i] == Gone || condemned[i] };
    new[i] = Gone
}

/* A worker that the anchor starts in an empty slot. The anchor plays its predecessor, and never accepts. */
proctype Fresh(byte i)
{
    {
        fresh[i] = Open;
        !has_anchor || stopping;
        leave(fresh[i])
    } unless { fresh[i] == Gone };
    atomic {
        fresh[i] = Gone;
        is_reaped[i] = true
    }
}

inline fill(i)
{
    atomic {
        is_vacant(i) && !stopping && is_reaped[i] -> is_reaped[i] = false;
        fresh[i] = Starting;
        run Fresh(i)
    }
}

/* The orders of an anchor: one roll-out, which settles in all slots or is taken back in all of them. */
inline roll_out()
{
    failed = false;
    turn = 0;
    do
    :: turn == SLOTS || failed || stopping -> break
    :: else ->
        if
        :: old[turn] != Open -> skip /* its slot is filled, or is served by another one */
        :: else ->
            order[turn]!Restart;
            begun[turn] = true;
            if
            :: said[turn]?Served
            :: said[turn]?Failed -> failed = true; begun[turn] = false
            /* Its successor goes on without it, if it can (G6). */
            :: old[turn] == Gone && empty(said[turn])
            :: stopping
            fi
        fi;
        turn++
    od;
    /* The probation: a slot may come back by itself meanwhile, and then all of them go back. */
    do
    :: turn = 0;
        do
        :: turn == SLOTS -> break
        :: else ->
            if
            :: said[turn]?[Failed] -> said[turn]?Failed; failed = true; begun[turn] = false
            :: !said[turn]?[Failed]
            fi;
            turn++
        od;
        break
    od;
    turn = 0;
    do
    :: turn == SLOTS || stopping -> break
    :: else ->
        if
        :: begun[turn] && is_alive(old[turn]) ->
            if
#ifdef DEFECT_ONE_SLOT_STAYS
            :: failed -> said[turn]!Failed
#else
            :: failed -> order[turn]!Revert
#endif
            :: else -> order[turn]!Settle
            fi;
            if
            :: said[turn]?Over
            :: said[turn]?Failed
            :: old[turn] == Gone && empty(said[turn])
            :: stopping
            fi
        :: else
        fi;
        turn++
    od;
    atomic {
        taken_back = failed;
        final = !failed
    }
}

active proctype Anchor()
{
    byte turn = 0;
    bool failed = false;
    bool begun[SLOTS];
    bool has_rolled = false, was_upgraded = false;
    atomic {
        turn = 0;
        do
        :: turn == SLOTS -> break
        :: else -> run Old(turn); turn++
        od
    };
    {
        do
        :: !has_rolled -> has_rolled = true; roll_out()
        /* Executed anew: what it knows and holds lies in a memfd. A worker that dies meanwhile is found dead later. */
        :: !was_upgraded ->
            was_upgraded = true;
            if
            :: skip /* the check of the new code fails: this one goes on */
            :: turn = 0; failed = false
            fi
        /* Another anchor takes the service over, in a moment in which nothing is under way. */
        :: newcomer == Starting ->
            holds_newcomer = true; /* the sockets are in the channel */
#ifdef DEFECT_LETS_GO_BEFORE_TAKEN
            holds_anchor = false;
#endif
            if
            :: newcomer == Open -> goto ended
            :: newcomer == Gone -> holds_newcomer = false; holds_anchor = true
            fi
#ifndef DEFECT_EMPTY_SLOTS_STAY
        :: fill(0)
        :: fill(LAST)
#endif
        :: stopping -> break
        od;
        /* The stop is told to whoever there is. Those that are no predecessors see it by themselves here. */
        turn = 0;
        do
        :: turn == SLOTS -> break
        :: turn < SLOTS && is_alive(old[turn]) && nfull(order[turn]) -> order[turn]!Stop; turn++
        :: turn < SLOTS && !is_alive(old[turn]) -> turn++
        od;
        /* It is the last one to go (docker stop, systemctl stop). */
        all_are_gone
ended:
        skip
    } unless { anchor == Gone };
    atomic {
        acts_newcomer = (newcomer == Open);
        holds_anchor = false;
        anchor = Gone
    }
}

/* Another anchor. It takes all or nothing: until it has everything, the former one serves on. */
proctype Newcomer()
{
    {
        holds_newcomer;
        newcomer = Open;
        anchor == Gone;
        do
#ifndef DEFECT_EMPTY_SLOTS_STAY
        :: fill(0)
        :: fill(LAST)
#endif
        :: stopping -> break
        od
    } unless { newcomer == Gone };
    skip
}

/* What is done to the service from outside. */
active proctype World()
{
    do
    :: deaths > 0 ->
        if
        :: atomic { is_alive(old[0]) -> old[0] = Gone; killed_old[0] = true; deaths-- }
        :: atomic { is_alive(new[0]) -> new[0] = Gone; killed[0] = true; deaths-- }
#if SLOTS > 1
        :: atomic { is_alive(old[1]) -> old[1] = Gone; deaths-- }
#endif
        :: atomic { is_alive(fresh[0]) -> fresh[0] = Gone; deaths-- }
#ifdef ANCHOR_DIES
        :: atomic { anchor != Gone -> anchor = Gone; holds_anchor = false; deaths-- }
#endif
        :: deaths = 0
        fi
#ifdef TAKEOVER
    :: atomic { newcomer == Absent && anchor == Open -> newcomer = Starting; run Newcomer() }
    :: atomic { newcomer == Starting && deaths > 0 -> newcomer = Gone; holds_newcomer = false; deaths-- }
#endif
#ifdef STOPS
    :: !stopping -> stopping = true
#endif
    :: deaths == 0 -> break
    od
}

#define has_no_anchor (anchor == Gone && !acts_newcomer)

/* Never refused: somebody holds the sockets, until the service is to end. */
ltl g1 { [] (stopping || has_no_anchor || holds_anchor || holds_newcomer) }
/* One acceptor: two generations of a slot never accept together. */
ltl g2 { [] (accepts(0) <= 1 && accepts(LAST) <= 1) }
/* A failure soon after the commit rolls back: whoever is paused accepts again. */
ltl g5 {
    [] ((old[0] == Paused && new[0] == Gone && !settled[0]) ->
        <> (old[0] == Open || killed_old[0] || stopping || has_no_anchor))
}
/* The death of the old generation costs nothing: its successor completes its start, and serves. */
ltl g6 {
    [] ((old[0] == Gone && new[0] == Starting && !aborted[0] && !condemned[0]) ->
        <> (new[0] == Open || broken[0] || killed[0] || stopping || has_no_anchor))
}
/* Whoever dies, the slot is served again. */
ltl served { [] (<> (accepts(0) == 1 && accepts(LAST) == 1 || stopping || has_no_anchor)) }
/* Nothing outlives its drain: whoever leaves ends, and at a stop everybody does. */
ltl g10 {
    [] ((old[0] == Leaving -> <> (old[0] == Gone)) && (new[0] == Leaving -> <> (new[0] == Gone)) &&
        (stopping -> <> all_are_gone) && (has_no_anchor -> <> all_are_gone))
}
/* All of it becomes final, or none of it: no new worker goes on in a service that was taken back. */
ltl all_or_none { [] (taken_back -> <> ((new[0] != Open || old[0] == Gone) && (new[LAST] != Open || old[LAST] == Gone))) }
