"""Words in column names, in several languages, that hint at the meaning of a column."""

import re
from collections.abc import Collection


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _stems(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ID_WORDS = _words("code guid hash id ids idx index key no nr num number pk ref sk uuid")
_QUALIFIERS = _words("anon anonymous encrypted external full hashed internal masked pseudo unique")
"""Words that may accompany an ID's name without changing its meaning, as in hashed_user_id."""
KEY_WORDS = {
    "user": _words(
        "account acct applicant benutzer borrower buyer candidat cardholder client cliente comprador consumer cust "
        "customer donor employee gamer guest haushalt hogar household kunde kunden learner lector listener member "
        "nutzer panelist participant passenger patient payer person player policyholder profile purchaser rater reader "
        "recipient renter requester respondent reviewer rider searcher shopper socio student subscriber tourist "
        "traveler traveller uid user userid username usr usuario utilisateur viewer visitor visitorid voter"
    ),
    "candidate": _words(
        "ad annonce anuncio anzeige app article articulo artikel asin book business candidate clip content course "
        "creative destination doc document episode exercise film game gif hotel iid item itemid job lesson "
        "listing movie news oferta offer pelicula place podcast poi post product producto produit produkt "
        "prop property question recipe restaurant show sku song story titel track venue video"
    ),
    "request": _words(
        "anfrage auction basket batch bid busqueda consulta display exposure feed impression impressionid list "
        "liste order page pageview pagina peticion query rec reco recommendation render req request search slate "
        "srch suche view warenkorb"
    ),
}
FALLBACK_KEY_WORDS = {
    "user": _words("browser cookie device email hh ip login msisdn sesion session sitzung tenant wallet worker"),
    "candidate": frozenset[str](),
    "request": _words("besuch sesion session sitzung visit visita"),
}
"""Words for columns that can serve as the key if no column has a better name."""
TIME_WORDS = _words(
    "anzeige at created date datetime datum day dt epoch event exposure fecha gezeigt heure hora impression log "
    "logged micros momento ms request s served shown since tag time timestamp ts unix utc view viewed visit when "
    "zeit zeitpunkt"
)
GROUP_WORDS = _words(
    "agent area browser campaign carrier channel city class country county currency device district grid group hour "
    "keyword language locale location month os page platform plz postal query referrer region search segment shop site "
    "source state store street term text type ua url version warehouse week year zip zipcode zone"
)
"""Words for locations, groups and times that many users share."""
CLOCK_WORDS = _words(
    "created date datetime datum day dt epoch fecha hour hora stunde time timestamp ts unix utc zeit zeitpunkt"
)
"""Words for times that may be stored as numbers in an unknown format."""
PLACEMENT_WORDS = _words(
    "carousel column display mailer orden placement platz pos posicion position rang rank row shelf slot"
)
SAMPLING_WORDS = _words("abtastrate kept muestreo sample samplerate sampling samplingrate stichprobe")
WEIGHT_WORDS = _words("gewicht instanceweight peso sampleweight weight weights wgt")
WEIGHT_QUALIFIERS = _words("instance person row sample survey w")
PAST_WORDS = _words(
    "already avg before cnt count ctr days ever frueher hist history last mean num past prev previous previously "
    "prior rate since total verified vorher was"
)
"""Words for values that existed before the request. A count of earlier clicks is not a label."""
CODE_WORDS = _words("cat category class code group id key kind nr plz segment typ type zip")
"""Words for integers that are codes rather than amounts."""
EVENT_TYPE_WORDS = _words("action art event evento kind typ type")
LABEL_STEMS = _stems(
    "abon accept action again angesehen appl attrit behalten bestellt block book bought bounc buy call cancel cart "
    "checkout churn clic click clk comment complain complet compr contact contrat conv devuel dislik download "
    "downvot engag enjoy exit fav finish follow forward fraud gef gekauft geöffnet gust happy hate hid hire hit insta "
    "kauf keep kept klick label lead lik listen lov match open order outcome pagad paid play pleas posit purchas rated "
    "read rebought recommend refund reject repeat repl report reserv respon retain retour return satisf sav seen shar "
    "skip sold spam stay storn subscri succes surviv swip target unfollow unsub upvot view vio visit vist vote watch "
    "wieder won zufrieden"
)
NEGATIVE_STEMS = _stems(
    "attrit block bounc cancel churn complain devuel dislik downvot exit fraud hate hid refund reject report retour "
    "return skip spam storn unfollow unsub"
)
"""Stems of unwanted behavior."""
_NOT = _words("kein keine nicht no non not")
OUTCOME_STEMS = _stems(
    "amount answer bestell betrag bezahlt checkout click conver deliver duration dwell engag feedback gasto gmv "
    "importe listen margin menge minutes paid payment profit purchas qty quantity rating refund return revenue "
    "review sales scroll seconds shipped spend spent stars survey umsatz verweil watch"
)
"""Stems of values that exist only after the request."""
NUMERIC_LABEL_STEMS = _stems(
    "bewertung dwell estrellas grade hours label listen minutes note overall puntu rate rating response revenue review "
    "score seconds spend stars sterne target watch"
)
"""Stems of numbers that a task may predict."""


def split_words(name: str) -> list[str]:
    """Return the lowercase words of a name, split at capitals and at characters that are not letters."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return [word for word in re.split(r"[\W_\d]+", parts.lower()) if word]


def _has_only(name: str, hints: Collection[str]) -> bool:
    """Return whether a name consists of at least one hint and, besides, only hints, `ID_WORDS` and `_QUALIFIERS`."""
    words = split_words(name)
    if len(words) == 1:  # A hint and an ID word can be joined, as in kundennr.
        return any(
            words[0] == hint or (len(hint) > 3 and words[0] in {hint + end for end in ID_WORDS}) for hint in hints
        )
    return any(word in hints for word in words) and all(
        word in hints or word in ID_WORDS | _QUALIFIERS for word in words
    )


def match_key_name(name: str, key_name: str) -> int:
    """Return 2 if a column has a name for a key (`KEY_WORDS`), 1 if it needs `FALLBACK_KEY_WORDS`, else 0.

    Args:
        name: Name of a column.
        key_name: `user`, `candidate` or `request`.
    """
    strong = KEY_WORDS[key_name]
    return 2 if _has_only(name, strong) else int(_has_only(name, strong | FALLBACK_KEY_WORDS[key_name]))


def is_negative_label(name: str) -> bool:
    """Return whether the name of a label denotes unwanted behavior, such as a refund."""
    return has_stem(name, NEGATIVE_STEMS) and not has_word(name, _NOT)


def is_id_name(name: str) -> bool:
    """Return whether a name denotes IDs, so that its integers are not times, however large."""
    is_key = any(_has_only(name, hints) for keys in (KEY_WORDS, FALLBACK_KEY_WORDS) for hints in keys.values())
    return (has_word(name, ID_WORDS) and not has_word(name, CLOCK_WORDS)) or (is_key and not has_word(name, TIME_WORDS))


def has_word(name: str, hints: frozenset[str]) -> bool:
    """Return whether any word of a name is a hint.

    Args:
        name: Name of a column.
        hints: Lowercase words to look for.
    """
    return not hints.isdisjoint(split_words(name))


def has_stem(name: str, stems: tuple[str, ...]) -> bool:
    """Return whether any word of a name begins with a stem.

    Args:
        name: Name of a column.
        stems: Lowercase beginnings of words.
    """
    return any(word.startswith(stems) for word in split_words(name))
