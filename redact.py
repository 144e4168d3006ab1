"""Private matters out of a text: addresses, phones, accounts, cards and keys by their form.

Idea: a cheap sign (an @, seven digits near each other, "ghp_") says where to look; a bounded
pattern says how far it goes; a validator (check digits, the ipaddress module) says whether it is
one. All kinds are looked for in the same text before anything is replaced: else one kind would be
found inside the mark that another has left. What is replaced becomes a typed mark such as <EMAIL>,
or a harmless stand-in of the same form, so that a model never learns to write marks.

    find(text) -> spans        redact(text) -> (text, {kind: count})

A form is all that is seen here. Names, streets and birthdays have none: they need a model that has
read much, as in Presidio. Nor is "jane at example dot com" found. Between numbers that only look
alike this errs on the side of privacy, except where what stands around says otherwise: 1.2.3.4
behind "version", "section" or == is no address, ten bare digits without "phone" no phone.

Every step takes time linear in the text, whatever it holds.

Run: python -m pytest tests/test_redact.py

Sources: RFC 5321 and 5322 (e-mail), RFC 5737 and 3849 (addresses for documentation), RFC 2606
(example.com), ISO 13616 (IBAN), ISO/IEC 7812 (cards), ITU-T E.164 (phones), RFC 7519 (JWT).
"""

import hashlib
import ipaddress
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from run import UserError

Style = Literal["tag", "surrogate"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Span(NamedTuple):
    """text[start:end] is of this kind."""

    start: int
    end: int
    kind: str


# --- e-mail ---------------------------------------------------------------------------------------

# What may stand before an @, read from right to left; quotes and brackets around it do not belong.
LOCAL_REVERSED, NOT_FIRST = re.compile(r"[\w+.'&%~-]*"), ".'&%~-"
# The last label is letters (or IDNA's), and an operator's operand, as in a@b.mean(), is no address.
DOMAIN = re.compile(r"(?:\w[\w-]{0,62}\.)+(?:xn--[\w-]{1,59}|[^\W\d_]{2,63})(?!-?\w|\()")


def emails(text: str) -> Iterator[Span]:
    """name@example.org, in letters of any script; each @ looks back as far as the one before it."""
    last, at = 0, text.find("@")
    while at >= 0:
        if domain := DOMAIN.match(text, at + 1):
            name = LOCAL_REVERSED.match(text[last:at][::-1])[0][::-1].lstrip(NOT_FIRST)
            if name:
                yield Span(at - len(name), domain.end(), "EMAIL")
        last = at + 1
        at = text.find("@", last)


# --- addresses of machines ------------------------------------------------------------------------

# Found from its first dot, which is rarer than digits.
QUAD_REST = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?!\w|\.[0-9])")
# What right before a dotted quad makes it the number of a version or of a section.
NUMBERED = {
    "v", "ver", "version", "versions", "release", "releases", "rev", "revision", "build", "section",
    "sections", "sect", "sec", "secs", "chapter", "chapters", "ch", "clause", "clauses", "appendix",
    "annex", "paragraph", "paragraphs", "figure", "figures", "fig", "table", "tables", "rfc",
}  # fmt: skip
COMPARED = ("==", ">=", "<=", "~=", "!=", "~>", "≥", "≤", "^", "§")
RFC = re.compile(r"\b[Rr][Ff][Cc][ -]?[0-9]{1,5},?\Z")
PRODUCT = re.compile(r"\b[A-Z][A-Za-z]+/\Z")
CONTEXT = 24  # characters before a number that may say what it is
NAT64, UNICAST = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("2000::/3")
INDEX = re.compile(r"[\w)\]]")
COLON = re.compile(r":[0-9A-Fa-f:]")
HEXADECIMAL = "0123456789abcdefABCDEF:."
HEX_RUN = re.compile(r"[0-9A-Fa-f:.]*")
LONGEST_IPV6 = 45
ZONE = re.compile(r"(?:%[\w.-]{1,16}(?<!\.))?")


def is_word(character: str) -> bool:
    """Whether a character, or none, is part of a word."""
    return character.isalnum() or character == "_"


def public(address: Address) -> bool:
    """Whether an address belongs to somebody: global, no multicast, and of IPv6 from 2000::/3.

    One of IPv4 inside one of IPv6 (mapped, or of NAT64) is judged in its place.
    """
    if address.version == 6:
        inner = address.ipv4_mapped
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return public(inner) if inner else address in UNICAST and address.is_global
    return address.is_global and not address.is_multicast


def ipv4(text: str, public_only: bool) -> Iterator[Span]:
    """Four numbers to 255 without leading zeros; not part of more, not a version or section."""
    for rest in QUAD_REST.finditer(text):
        dot, end = rest.span()
        before = text[max(0, dot - CONTEXT) : dot]
        left = before.rstrip(string.digits)
        start = dot - len(before) + len(left)
        if left and (is_word(left[-1]) or (left[-1] == "." and left[-2:-1].isdigit())):
            continue
        if is_address(text[start:end], public_only) and not is_numbered(left):
            yield Span(start, end, "IPV4")


def is_numbered(left: str) -> bool:
    """Whether a text ends so that a version or section follows: "version ", "==", "RFC 2616, "."""
    left = left.rstrip(" \t\n\"'")
    if left.endswith(COMPARED) or (left.endswith("/") and PRODUCT.search(left)):
        return True
    word = left.rstrip(".:#-")
    word = word[len(word.rstrip(string.ascii_letters)) :]
    return word.lower() in NUMBERED if word else "fc" in left.lower() and bool(RFC.search(left))


@lru_cache(1 << 12)
def is_address(text: str, public_only: bool) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not public_only or public(address)


def ipv6(text: str, public_only: bool) -> Iterator[Span]:
    """Eight groups, some perhaps left out at ::, the last two perhaps a dotted quad."""
    position = 0
    while colon := COLON.search(text, position):
        head = text[max(position, colon.start() - LONGEST_IPV6) : colon.start()]
        start = colon.start() - len(head) + len(head.rstrip(HEXADECIMAL))
        position = end = HEX_RUN.match(text, colon.start()).end()
        if end - start > 2 * LONGEST_IPV6 or text.count(":", start, end) < 2:
            continue
        run = text[start:end].rstrip(".")
        run = run[:-1] if run.endswith(":") and not run.endswith("::") else run  # punctuation
        stop = start + len(run)
        if start and text[start - 1].isalpha():  # "IPv6:" does not belong
            start = text.find(":", start, end) + 1
        if may_be_ipv6(text, start, stop) and is_address(text[start:stop], public_only):
            yield Span(start, ZONE.match(text, stop).end(), "IPV6")


def may_be_ipv6(text: str, start: int, end: int) -> bool:
    """No slice x[1::2], scope a::b, or network card's eight pairs: one group has three digits."""
    groups = [group for group in text[start:end].split(":") if group]
    if not 2 <= len(groups) <= 8 or max(map(len, groups)) < 3 or ":::" in text[start:end]:
        return False
    left, right = text[start - 1 : start], text[end : end + 1]
    return not (is_word(left) or is_word(right) or (left == "[" and INDEX.match(text, start - 2)))


# --- account and card numbers ---------------------------------------------------------------------

# Characters of an IBAN by country: SWIFT's registry of ISO 13616.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BI": 27, "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27,
    "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32,
    "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24,
    "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31,
    "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip
IBAN_DIGITS = {ord(letter): str(int(letter, 36)) for letter in string.ascii_uppercase}
NO_SIGNS = dict.fromkeys(map(ord, " \xa0-"))
IBAN_START = re.compile(r"[A-Z][A-Z][0-9][0-9]")
IBAN_REST = {
    length: re.compile(rf"(?:[ \xa0-]?[A-Z0-9]){{{length - 4}}}(?!\w)")
    for length in {*IBAN_LENGTHS.values()}
}


def ibans(text: str) -> Iterator[Span]:
    """Country, two check digits, and as many letters and digits as the country has."""
    for found in IBAN_START.finditer(text):
        length = IBAN_LENGTHS.get(found[0][:2])
        rest = IBAN_REST[length].match(text, found.end()) if length else None
        if (
            rest
            and not is_word(text[found.start() - 1 : found.start()])
            and is_iban(found[0] + rest[0])
        ):
            yield Span(found.start(), rest.end(), "IBAN")


def is_iban(text: str) -> bool:
    """The number whose letters are 10 to 35 and whose first four stand last is 1 modulo 97."""
    compact = text.translate(NO_SIGNS)
    if not 2 <= int(compact[2:4]) <= 98:
        return False
    return int((compact[4:] + compact[:4]).translate(IBAN_DIGITS)) % 97 == 1


# Digits in one go, or in the groups that cards show: four by four, 4-6-5, 4-6-4, 6-13.
CARD = re.compile(
    r"(?<!\w)(?<!\w[-/])(?<![0-9][.:])"
    r"[2-6][0-9]{3}(?:[0-9]{9,15}|([ \xa0-])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(\1[0-9]{1,3})?"
    r"|([ \xa0-])[0-9]{6}\3[0-9]{4,5}|[0-9]{2}[ \xa0-][0-9]{13})"
    r"(?!\w|-\w|\.[0-9])"
)
CARD_PREFIX = re.compile(
    r"4|5[0-8]|6"  # Visa; Mastercard and Maestro; Maestro, Discover and UnionPay
    r"|3[47]|3(?:0[0-59]|[689])|35(?:2[89]|[3-8])"  # American Express, Diners, JCB
    r"|2(?:20[0-4]|22[1-9]|2[3-9]|[3-6]|7[01]|720)"  # Mir, Mastercard
)


def cards(text: str, start: int, end: int) -> Iterator[Span]:
    """13 to 19 digits with a known beginning and Luhn's check digit; a CVV behind is no part."""
    for found in CARD.finditer(text, start, end):
        for stop in (found.end(), found.start(2)):
            digits = text[found.start() : max(0, stop)].translate(NO_SIGNS)
            if 13 <= len(digits) <= 19 and CARD_PREFIX.match(digits) and luhn(digits):
                yield Span(found.start(), stop, "CARD")
                break


def luhn(digits: str) -> bool:
    """The sum of all digits, of which every other from the right is doubled, divides by ten.

    Of a doubled digit its own two digits are added: 7 counts as 1 + 4.
    """
    plain, doubled = map(int, digits[-1::-2]), map(int, digits[-2::-2])
    return (sum(plain) + sum(2 * d - 9 * (d > 4) for d in doubled)) % 10 == 0


# --- phones ---------------------------------------------------------------------------------------

# Seven digits and more with few signs between them: where to look for cards and phones.
NUMBER = re.compile(r"[0-9](?:[ .\xa0()/-]{0,3}[0-9]){6,}+")
PHONE = re.compile(
    r"""(?<!\w)(?<!\w[-/])(?<![0-9][.:])(?:
      (?:\+|00)1[ .\xa0-]?\(?[2-9][0-9]{2}\)?[ .\xa0/-]{0,2}[0-9]{3}[ .\xa0-]?[0-9]{4}
    | (?:\+|00)[1-9](?:[ .\xa0()/-]{0,3}[0-9]){6,14}
    | (?:1[ .-]?)?\([2-9][0-9]{2}\)[ .\xa0-]{0,2}[0-9]{3}[ .\xa0-]?[0-9]{4}
    | (?:1[ .-])?[2-9][0-9]{2}[ .\xa0/-][0-9]{3}[ .\xa0-][0-9]{4}
    | (?<!\b[0-9][ ])(?<!\b[0-9]{2}[ ])(?<!\b[0-9]{3}[ ])
      \((?!(?:19|20)[0-9]{2}\))(?:0[1-9][0-9]{0,4}|[1-9][0-9]{1,4})\)
      [ \xa0/-]{0,2}[0-9](?:[ \xa0-]?[0-9]){4,9}
    | (?![0-9]{2}([ ./-])[0-9]{2}\1(?:(?:19|20)[0-9]{2}(?![0-9])|[0-9]{2}(?![0-9]|\1[0-9])))
      (?:0[1-9](?:[ .\xa0-][0-9]{2}){4}
        |0[1-9][0-9]{0,4}[ .\xa0/-]{1,2}(?:[0-9]{5,9}(?:-[0-9]{1,4})?
                                         |[0-9]{1,4}(?:[ .\xa0/-][0-9]{2,4}){1,3}))
    | 1[3-9][0-9][ -][0-9]{4}[ -][0-9]{4}
    )(?!\w|-\w|[./:][0-9])""",
    re.VERBOSE,
)
# Behind one of these words seven digits are a phone, however they stand; but for ISO's dates.
CALL = re.compile(
    r"\b(?:tel|telephone|phones?|call|fax|mobile|mob|cell|telefon|tlf|whatsapp|sms)\b"
    r"[ .:#=(\"']{0,4}(?:(?:no|number|me|us|him|her|is)\b[ .:#=]{0,3}){0,2}\Z",
    re.IGNORECASE,
)
BARE_PHONE = re.compile(
    r"(?![12][0-9]{3}-[0-9]{2}-[0-9]{2})[+(]*[0-9](?:[ .\xa0()/-]{0,2}[0-9]){6,14}"
    r"(?!\w|[./:-][0-9])"
)
NOT_PHONE = re.compile(r"\b(?:isbn|issn|doi|pmid|arxiv|dewey)\b[^\n]{0,12}\Z", re.IGNORECASE)
PAIRS, PAIR = re.compile(r"[0-9]{2}(?: [0-9]{2}){3,5}"), re.compile(r"\b[0-9A-Fa-f]{2}\b")


def numbers(text: str, wanted: frozenset[str]) -> Iterator[Span]:
    """Cards and phones, where digits are."""
    for found in NUMBER.finditer(text):
        start, end = found.span()
        while start and text[start - 1] in "+(" and found.start() - start < 3:
            start -= 1
        if "CARD" in wanted and end - start >= 13:
            yield from cards(text, start, end + 2)
        if "PHONE" in wanted:
            yield from phones(text, start, end + 2)


def phones(text: str, start: int, end: int) -> Iterator[Span]:
    """International with +, national with an area code, and any behind "phone"."""
    left = text[max(0, start - CONTEXT) : start]
    if (found := BARE_PHONE.match(text, start, end)) and CALL.search(left):
        start = end_of_first(text, *found.span())
        yield Span(found.start(), start, "PHONE")
    elif NOT_PHONE.search(left):
        return
    last = start
    while found := PHONE.search(text, start, end):
        start = end_of_first(text, *found.span())
        if is_phone(text, found.start(), start, last):
            yield Span(found.start(), start, "PHONE")
            last = start
        else:
            start = found.end()


def end_of_first(text: str, start: int, end: int) -> int:
    """Where the first phone ends, if blanks part several.

    None has more than 15 digits, a national one no more than 13; behind nine of them a group with 0
    or a bracket may begin the next.
    """
    digits, at, most = 0, start, 15 if text[start] == "+" else 13
    for group in text[start:end].split(" "):
        more = count_digits(group)
        begins = digits >= 9 and group.startswith(("0", "(")) and PHONE.match(text, at)
        if begins or digits + more > most:
            return start + len(text[start : at - 1].rstrip()) if digits else end
        digits, at = digits + more, at + len(group) + 1
    return end


def count_digits(text: str) -> int:
    return sum(map(str.isdigit, text))


def is_phone(text: str, start: int, end: int, last: int) -> bool:
    """Enough digits for what stands between them; no decimal, and no row of pairs as in a dump.

    last: where the phone before ended, which is no such pair.
    """
    found = text[start:end]
    digits = count_digits(found)
    if found.startswith("+"):  # behind it all may stand in one go, but not as a decimal
        solid = re.fullmatch(r"\+([0-9]+\.)?[0-9]+", found)
        return not solid or (solid[1] is None and digits >= 9)
    if found.startswith("00"):
        return not found.isdigit()
    if PAIRS.fullmatch(found):
        before = start - 3 >= last and PAIR.match(text, start - 3)
        if before or (PAIR.match(text, end + 1) and not PHONE.match(text, end + 1)):
            return False
    return (9 if "." in found else 8) <= digits <= 13


# --- keys -----------------------------------------------------------------------------------------

# How secrets of well-known services begin and go on.
KEYS = {
    "AKIA": r"[A-Z0-9]{16}",
    "ASIA": r"[A-Z0-9]{16}",
    "AIza": r"[\w-]{35}",
    "GOCSPX-": r"[\w-]{20,40}",
    "ya29.": r"[\w-]{20,512}",
    "ghp_": r"[A-Za-z0-9]{36,255}",
    "gho_": r"[A-Za-z0-9]{36,255}",
    "ghu_": r"[A-Za-z0-9]{36,255}",
    "ghs_": r"[A-Za-z0-9]{36,255}",
    "ghr_": r"[A-Za-z0-9]{36,255}",
    "github_pat_": r"[A-Za-z0-9_]{22,255}",
    "glpat-": r"[\w-]{20,255}",
    "sk-": r"(?=[A-Za-z_-]{0,64}[0-9])[\w-]{20,255}",  # with a digit: sk-container is a style
    "sk_live_": r"[A-Za-z0-9]{16,255}",
    "rk_live_": r"[A-Za-z0-9]{16,255}",
    "whsec_": r"[A-Za-z0-9+/]{24,255}",
    "xox": r"[abeoprs]-[A-Za-z0-9-]{10,255}",
    "xapp-": r"[A-Za-z0-9-]{10,255}",
    "hf_": r"[A-Za-z0-9]{30,60}",
    "npm_": r"[A-Za-z0-9]{36}",
    "pypi-": r"AgE[\w-]{50,512}",
    "dop_v1_": r"[a-f0-9]{64}",
    "shpat_": r"[a-fA-F0-9]{32}",
    "SG.": r"[\w-]{22}\.[\w-]{43}",
    "eyJ": r"[\w-]{8,4096}\.eyJ[\w-]{8,8192}\.[\w-]{0,2048}",
}
KEY_REST = {prefix: re.compile(rest + r"(?![\w-])", re.ASCII) for prefix, rest in KEYS.items()}
PEM = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
PEM_BODY = re.compile(r"[A-Za-z0-9+/=\s:,.-]{0,16384}")
PEM_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")


def keys(text: str) -> Iterator[Span]:
    """Secrets that begin as those of a well-known service do, and blocks of private keys."""
    for prefix in [prefix for prefix in KEY_REST if prefix in text]:
        at, rest = text.find(prefix), KEY_REST[prefix]
        while at >= 0:
            found = None
            if not at or (not is_word(text[at - 1]) and text[at - 1] != "-"):
                found = rest.match(text, at + len(prefix))
            if found:
                yield Span(at, found.end(), "KEY")
            at = text.find(prefix, found.end() if found else at + len(prefix))
    if "PRIVATE KEY" in text:
        yield from blocks(text)


def blocks(text: str) -> Iterator[Span]:
    """-----BEGIN … PRIVATE KEY----- to its end, or while its letters go on if that is missing."""
    position = 0
    while begin := PEM.search(text, position):
        body = PEM_BODY.match(text, begin.end()).end()
        end = PEM_END.search(text, begin.end(), body + 80)
        position = end.end() if end else body
        yield Span(begin.start(), position, "KEY")


# --- all in one pass ------------------------------------------------------------------------------

DIGIT = re.compile(r"[0-9]")
KINDS = ("KEY", "EMAIL", "IBAN", "CARD", "IPV6", "IPV4", "PHONE")  # which wins a tie


def find(text: str, kinds: Iterable[str] = KINDS, public_only: bool = True) -> list[Span]:
    """What is private in the text, in order, without overlaps: the leftmost, then the longest.

    public_only: of addresses only those that belong to somebody, not 127.0.0.1 or 10.0.0.1.
    """
    wanted = frozenset(kinds)
    if unknown := wanted - {*KINDS}:
        raise UserError(f"{', '.join(sorted(unknown))} is no kind: choose of {', '.join(KINDS)}")
    spans: list[Span] = []
    if "KEY" in wanted:
        spans += keys(text)
    if "EMAIL" in wanted and "@" in text:
        spans += emails(text)
    if "IPV6" in wanted and ":" in text:
        spans += ipv6(text, public_only)
    if DIGIT.search(text):
        if "IBAN" in wanted:
            spans += ibans(text)
        if "IPV4" in wanted:
            spans += ipv4(text, public_only)
        if wanted & {"CARD", "PHONE"}:
            spans += numbers(text, wanted)
    spans.sort(key=lambda span: (span.start, -span.end, KINDS.index(span.kind)))
    kept: list[Span] = []
    for span in spans:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


ROUNDS = 8  # more than two were never seen to be needed


def redact(
    text: str,
    style: Style = "tag",
    kinds: Iterable[str] = KINDS,
    public_only: bool = True,
    key: bytes = b"",
) -> tuple[str, dict[str, int]]:
    """The text without what `find` finds, and how many of each kind were replaced.

    style: "tag" puts <KIND>; "surrogate" a harmless value of the same form, always the same one for
    the same value and key, so that who wrote whom can still be followed. Again is the same: what is
    left is looked through until nothing is found, as a number may stand free once its neighbour is
    gone.
    """
    if style not in get_args(Style):
        raise UserError(f"there is no style {style!r}: choose {' or '.join(get_args(Style))}")
    kinds, counts = tuple(kinds), Counter()
    for _ in range(ROUNDS):
        spans = find(text, kinds, public_only)
        if style == "surrogate":
            spans = [s for s in spans if not is_surrogate(s.kind, text[s.start : s.end])]
        if not spans:
            break
        parts, position = [], 0
        for start, end, kind in spans:
            mark = f"<{kind}>" if style == "tag" else surrogate(kind, text[start:end], key)
            parts += text[position:start], mark
            position = end
        text = "".join(parts) + text[position:]
        counts.update(span.kind for span in spans)
    return text, dict(counts)


# --- stand-ins ------------------------------------------------------------------------------------

SURROGATE = {
    "EMAIL": re.compile(r"user[0-9]+@example\.com"),
    "PHONE": re.compile(r"202-555-01[0-9]{2}"),
    "IPV4": re.compile(r"(?:192\.0\.2|198\.51\.100|203\.0\.113)\.[0-9]{1,3}"),
    "IPV6": re.compile(r"2001:db8:[0-9a-f:]*"),
}


def surrogate(kind: str, value: str, key: bytes = b"") -> str:
    """A value of the same form that belongs to nobody, chosen by a keyed hash of the value.

    Addresses and names set aside for documentation, phones set aside for films; an IBAN and a card
    whose check digits are wrong.
    """
    digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), key=key[:64], digest_size=8)
    k = int.from_bytes(digest.digest(), "big")
    match kind:
        case "EMAIL":
            return f"user{k % 10**6}@example.com"
        case "PHONE":
            return f"202-555-01{k % 100:02}"
        case "IPV4":
            return f"{('192.0.2', '198.51.100', '203.0.113')[k % 3]}.{k // 3 % 254 + 1}"
        case "IPV6":
            return f"2001:db8::{k % 0xFFFF:x}:{k // 0xFFFF % 0xFFFF:x}"
        case "IBAN":
            return value[:2] + "00" + str(k).zfill(32)[4 - IBAN_LENGTHS[value[:2]] :]
        case "CARD":
            digits = f"4000{k % 10**11:011}"
            last = next(d for d in "01" if not luhn(digits + d))
            return f"{digits}{last}"
        case _:
            return f"KEY{k:016x}"


def is_surrogate(kind: str, value: str) -> bool:
    return kind in SURROGATE and bool(SURROGATE[kind].fullmatch(value))
