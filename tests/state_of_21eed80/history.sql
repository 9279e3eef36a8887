BEGIN TRANSACTION;
CREATE TABLE swap_writes (
        day TEXT PRIMARY KEY,
        engine_idle INTEGER NOT NULL,
        engine_busy INTEGER NOT NULL,
        other_idle INTEGER NOT NULL,
        other_busy INTEGER NOT NULL,
        unknown_idle INTEGER NOT NULL,
        unknown_busy INTEGER NOT NULL
    ) WITHOUT ROWID
    ;
INSERT INTO "swap_writes" VALUES('@TODAY@',1,2,4,8,16,32);
CREATE TABLE warmth_costs (
        day TEXT PRIMARY KEY,
        passes INTEGER NOT NULL,
        read_bytes INTEGER NOT NULL,
        engine_ms INTEGER NOT NULL,
        cpu_ms INTEGER NOT NULL
    ) WITHOUT ROWID
    ;
INSERT INTO "warmth_costs" VALUES('@TODAY@',3,4096,1500,2500);
COMMIT;
PRAGMA user_version = 2;
