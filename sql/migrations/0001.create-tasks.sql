-- The table of tasks, the one index that serves its lists, and every rule that the API promises.

CREATE TABLE tasks (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id text NOT NULL,
    title text NOT NULL,
    description text,
    completed boolean NOT NULL DEFAULT FALSE,
    version bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT id_is_positive CHECK (id > 0),
    CONSTRAINT user_id_is_1_to_255_characters CHECK (char_length(user_id) BETWEEN 1 AND 255),
    CONSTRAINT title_is_1_to_200_characters CHECK (char_length(title) BETWEEN 1 AND 200),
    -- Listed one by one: what counts as white space in a regular expression depends on the collation.
    CONSTRAINT title_is_not_only_white_space CHECK (
        btrim(
            title,
            E'\t\n\x0b\f\r\x1c\x1d\x1e\x1f \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006'
            '\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000'
        ) <> ''
    ),
    CONSTRAINT description_is_at_most_2000_characters CHECK (char_length(description) <= 2000),
    CONSTRAINT version_is_positive CHECK (version > 0),
    CONSTRAINT times_are_of_rfc_3339 CHECK (
        created_at >= '0001-01-01 00:00:00+00'
        AND updated_at < '10000-01-01 00:00:00+00'
    ),
    CONSTRAINT updated_at_is_not_before_created_at CHECK (updated_at >= created_at)
);

-- "This user's tasks, newest first", and every page of it.
CREATE INDEX tasks_newest_first ON tasks (user_id, created_at DESC, id DESC);

-- What a client may send. The statements cast their JSON to these, so that psql refuses what the API refuses:
-- a title that is a number, a completed that is "yes", a member that no task has.
CREATE DOMAIN task_changes AS jsonb
CONSTRAINT body_is_an_object CHECK (jsonb_typeof(value) = 'object')
CONSTRAINT body_has_only_known_members CHECK (
    jsonb_typeof(value) <> 'object' OR value - ARRAY['title', 'description', 'completed'] = '{}'
)
CONSTRAINT title_is_a_string CHECK (jsonb_typeof(value -> 'title') = 'string')
CONSTRAINT description_is_a_string_or_null CHECK (jsonb_typeof(value -> 'description') IN ('string', 'null'))
CONSTRAINT completed_is_true_or_false CHECK (jsonb_typeof(value -> 'completed') = 'boolean');

CREATE DOMAIN new_task AS task_changes
CONSTRAINT title_is_required CHECK (value ? 'title');
