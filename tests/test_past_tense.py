"""The rule for the names of events, by example and by property."""

import keyword
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whereupon import _past_tense
from whereupon._past_tense import problem_with

pytestmark = pytest.mark.unit


def _listed(text: str) -> list[str]:
    return text.split()


WORKFLOWS = _listed(
    """
    UserRegistration EmailVerification UserLogin UserLogout UserPasswordChange PasswordResetRequest
    PasswordResetConfirm SessionRevocation AllSessionsRevocation ProviderConnection ProviderDisconnection
    TokenRefresh AccountSync TransactionSync
    """
)
CATALOGUE = [workflow + phase for workflow in WORKFLOWS for phase in ("Attempted", "Succeeded", "Failed")] + [
    "AccountCreated",
    "AccountUpdated",
    "AccountClosed",
    "AccountBalanceUpdated",
]

REGULAR = _listed(
    """
    Registered UserRegistered TransactionListed UserProfileViewed AccountBalanceFetched
    UserPasswordChangeSucceeded CreateUserFailed SendEmailRequested RegistrationAttempted OAuthTokenRevoked
    HTTPRequestFailed KYCCheckPassed User2FAEnabled B2BInvoiceApproved S3BucketCreated URLsUpdated
    DocumentOCRed UserSMSed AccountAged PointsUsed ContractTermsAgreed FundsFreed PaymentGuaranteed
    MatchRefereed OrderCancelled OrderCanceled InvoiceOverpaid CustomerLearned BookingCancelled
    StringReplaced AddOnPurchased SetUpCompleted EmailCouldNotBeDelivered PayPalPaymentReceived
    LinkedInAccountConnected GuestWellBeingChecked
    """
)
IRREGULAR = _listed(
    """
    EmailSent InvoicePaid CashWithdrawn OfferMade IndexBuilt TrialBegun BidderGone DealWon ShipmentLost
    ItemFound PaymentHeld PromiseKept MemberLeft GoalMet OrderPut AccountRead LimitSet PasswordReset GateShut
    PriceCut StockSplit BudgetSpent HouseSold ShareBought ParcelBrought ExamTaken ConsentGiven LetterWritten
    FileRewritten FileOverwritten CardDrawn AccountOverdrawn BallThrown FactKnown AdShown PortfolioGrown
    WinnerChosen AssetFrozen AccountUnfrozen SealBroken PostHidden AccessForbidden PinForgotten CarDriven
    RateRisen PriceFallen FlightSeen WorkDone EditUndone TestRedone JobRun JobRerun OrderBecome LimitOvercome
    TermsUnderstood TaxWithheld AppealUpheld InvoiceUnderpaid InvoicePrepaid LoanRepaid PortBound PortRebound
    ClockWound TeamLed DataFed CarSped LotBid RivalOutbid TargetHit PlayerQuit FlatLet VoteCast ShowBroadcast
    SalesForecast TripCost PipeBurst DriverHurt EggLaid WordSaid EmailResent CacheRebuilt TicketResold
    ModelRemade ExamRetaken OrderMistaken BikeStolen OathSworn SheetTorn ShoesWorn ShipSunk FloorSwept
    GuestSlept CardsDealt WordMeant TremorFelt BookLent RuleBent DoorStuck DealStruck VerdictStood
    ServiceSpun VoteSwung CourseTaught IdeaThought FraudCaught ClaimFought RefundSought StoryTold
    FateForetold WorkerWoken BookProofread InvoiceUnpaid MessageUnread OrderForeseen ContractMisunderstood
    TicketWithstood LoadShed MessageMisread ApiSunset ClusterSplit DoubtCast MoneyUnspent SpeechOverheard
    LabourForgone
    """
)
SIMPLE_PAST = _listed(
    """
    PriceFell PriceRose SubscriptionBecameActive UserWentOffline InvoiceBecameOverdue WorkerBroke
    """
)
WITH_TAIL = _listed(
    """
    UserLoggedIn UserSignedUp AccountTakenOver MoneySentToBank EmailMarkedAsSpam LimitExceededForUser
    CardTurnedOff OrderShippedLate PasswordChangedByAdmin UserRegisteredEvent UserRegisteredDomainEvent
    AccountShutDown ServerSetUp OrderPaidInFull SchemaMigratedToV2 UserEnrolledIn2FA OrderMovedToStage2
    ReportGeneratedMonthly UserRemovedFromAllActiveGroups MailSentSuccessfully LoanWrittenOff
    AccountFellBelowMinimum UserBornIn1970
    """
)


@pytest.mark.parametrize("name", CATALOGUE + REGULAR + IRREGULAR + SIMPLE_PAST + WITH_TAIL)
def test_a_name_that_says_what_has_happened_is_fine(name: str) -> None:
    assert problem_with(name) is None


@pytest.mark.parametrize("name", ["_UserRegistered", "__UserRegistered", "UserRegistered_"])
def test_underscores_around_a_name_do_not_count(name: str) -> None:
    assert problem_with(name) is None


COMMANDS = {
    "SendWelcomeEmail": "WelcomeEmailSent",
    "RegisterUser": "UserRegistered",
    "ChangePassword": "PasswordChanged",
    "ConnectProvider": "ProviderConnected",
    "CreateAuditLog": "AuditLogCreated",
    "ResetPassword": "PasswordReset",
    "ReadAccount": "AccountRead",
    "SetLimit": "LimitSet",
    "SendFailedNotification": "FailedNotificationSent",
    "ProcessPaidOrders": "PaidOrdersProcessed",
    "RetryFailedPayments": "FailedPaymentsRetried",
    "SendMoneyToBank": "MoneySentToBank",
    "SignUpUser": "UserSignedUp",
    "LogInUser": "UserLoggedIn",
    "SwitchOffCard": "CardSwitchedOff",
    "SendPasswordReset": "PasswordResetSent",
    "CreateForecast": "ForecastCreated",
    "SubmitForm": "FormSubmitted",
    "CancelOrder": "OrderCancelled",
    "NotifyCustomer": "CustomerNotified",
    "ResendInvoice": "InvoiceResent",
    "OverwriteFile": "FileOverwritten",
    "UnbindCard": "CardUnbound",
    "SyncLinkedIn": "LinkedInSynced",
    "GetAccount": "AccountRetrieved",
    "SendWeeklyReport": "WeeklyReportSent",
    "RegisterUserEvent": "UserRegistered",
    "_SendMail": "_MailSent",
    "RevokeOAuthToken": "OAuthTokenRevoked",
}


@pytest.mark.parametrize(("name", "suggestion"), COMMANDS.items())
def test_a_command_is_turned_into_the_fact_it_leads_to(name: str, suggestion: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert problem.startswith(f"{name} reads as a command")
    assert f'Call it "{suggestion}".' in problem


@pytest.mark.parametrize("name", ["SetToZero", "ReadFromFile", "PutOnHold", "ShutDown", "CutOffUser", "Send2FA"])
def test_a_command_that_cannot_be_turned_is_refused_without_a_guess(name: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert problem.startswith(f"{name} reads as a command")


PROGRESSIVES = {
    "UserRegistering": "UserRegistered",
    "PaymentProcessing": "PaymentProcessed",
    "UserLoggingIn": "UserLoggedIn",
    "UserSigningUp": "UserSignedUp",
    "WorkerDying": "WorkerDied",
    "CustomerAgreeing": "CustomerAgreed",
    "ServerStopping": "ServerStopped",
    "FileCopying": "FileCopied",
    "OrderChanging": "OrderChanged",
    "EmailSending": "EmailSent",
    "InvoicePaying": "InvoicePaid",
    "FileOverwriting": "FileOverwritten",
    "TeamWinning": "TeamWon",
    "CacheRebuilding": "CacheRebuilt",
    "RoomBooking": "RoomBooked",
}


@pytest.mark.parametrize(("name", "suggestion"), PROGRESSIVES.items())
def test_the_present_progressive_is_refused_for_its_participle(name: str, suggestion: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert "present progressive" in problem
    assert f'Call it "{suggestion}".' in problem


PRESENT = {
    "UserRegisters": "UserRegistered",
    "UserRegister": "UserRegistered",
    "UserSucceed": "UserSucceeded",
    "PaymentFail": "PaymentFailed",
    "PaymentFails": "PaymentFailed",
    "LimitExceeds": "LimitExceeded",
    "JobRetries": "JobRetried",
    "HTTPSend": "HTTPSent",
    "UserLogsIn": "UserLoggedIn",
    "UserSignUp": "UserSignedUp",
    "UserWillRegister": "UserRegistered",
    "EmailToSend": "EmailSent",
    "Register": "Registered",
    "PriceChange": "PriceChanged",
    "PriceChanges": "PriceChanged",
    "AccountUpdate": "AccountUpdated",
    "OrderShip": "OrderShipped",
}


@pytest.mark.parametrize(("name", "suggestion"), PRESENT.items())
def test_the_present_tense_is_refused_for_its_participle(name: str, suggestion: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert "present tense" in problem
    assert f'Call it "{suggestion}".' in problem


@pytest.mark.parametrize("name", ["EmailWillBeSent", "EmailBeingSent", "EmailIsBeingSent", "EmailToBeSent"])
def test_a_passive_that_is_still_to_happen_is_refused(name: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert "still to happen" in problem
    assert 'Call it "EmailSent".' in problem


@pytest.mark.parametrize("name", ["UserDidNotRegister", "SubscriptionAboutToExpire", "EmailWillNeverBeSent"])
def test_nothing_is_suggested_that_would_say_the_contrary(name: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert "Call it" not in problem


NOUNS = {
    "Payment": "PaymentSucceeded",
    "UserRegistration": "UserRegistered",
    "Registration": "RegistrationSucceeded",
    "PaymentFailure": "PaymentFailed",
    "UserLogin": "UserLoggedIn",
    "OrderCancellation": "OrderCancelled",
    "UserProfile": None,
    "User": None,
    "UserEvent": None,
    "CustomerOrder": None,
    "NewsFeed": None,
    "UserNeed": None,
    "GrassSeed": None,
    "TopSpeed": None,
    "RareBreed": None,
    "RiverBed": None,
    "LightRed": None,
    "UserLED": None,
    "UserCred": None,
    "FirstHundred": None,
    "UserInput": None,
    "CommandOutput": None,
    "AccountPresent": None,
    "TestOutcome": None,
    "CronString": None,
    "TeamMeeting": None,
    "MoneySpring": None,
    "BestellungVerworfen": None,
    "UserIsHappy": None,
    "ExpiredTokenReport": None,
}


@pytest.mark.parametrize(("name", "suggestion"), NOUNS.items())
def test_a_name_that_ends_in_an_unknown_word_is_told_how_to_declare_it(name: str, suggestion: str | None) -> None:
    problem = problem_with(name)
    assert problem is not None
    word = name.removesuffix("Event")
    word = re.findall("[A-Z]+[a-z]*", word)[-1]
    assert "is not known as a past participle" in problem
    assert problem.endswith(f'class {name}(DomainEvent, participle="{word}").')
    assert _suggested(name) == suggestion


@pytest.mark.parametrize(("name", "word"), [("CustomerPlacedOrder", "Placed"), ("UserSentMoney", "Sent")])
def test_a_participle_before_its_object_is_to_come_last(name: str, word: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert f'End it with "{word}"' in problem
    assert problem.endswith(f'class {name}(DomainEvent, participle="{word}").')
    assert problem_with(name, word) is None


@pytest.mark.parametrize(
    ("name", "suggestion", "version"),
    [
        ("OrderShippedV2", "OrderShipped", 2),
        ("OrderShipped2", "OrderShipped", 2),
        ("OrderShipped02", "OrderShipped", 2),
        ("OrderShippedVersion3", "OrderShipped", 3),
        ("OrderShippedv2", "OrderShipped", 2),
        ("OrderShippedV2Event", "OrderShipped", 2),
        ("UserLoggedInV2", "UserLoggedIn", 2),
        ("UserLoggedIn2", "UserLoggedIn", 2),
        ("OrderShippedLateV12", "OrderShippedLate", 12),
        ("SendWelcomeEmailV2", "WelcomeEmailSent", 2),
    ],
)
def test_a_version_belongs_beside_the_base_class(name: str, suggestion: str, version: int) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert f'Call it "{suggestion}" and say: class {suggestion}(DomainEvent, version={version}).' in problem


def test_a_version_behind_a_noun_is_refused_as_a_version() -> None:
    problem = problem_with("Reservation2")
    assert problem is not None
    assert "declare version=2" in problem


@pytest.mark.parametrize(
    ("name", "reason", "suggestion"),
    [
        ("user_registered", "underscores", "UserRegistered"),
        ("User_Registered", "underscores", "UserRegistered"),
        ("USER_REGISTERED", "underscores", "UserRegistered"),
        ("_user_registered", "underscores", "_UserRegistered"),
        ("send_welcome_email", "underscores", "WelcomeEmailSent"),
        ("userRegistered", "small letter", "UserRegistered"),
        ("registerUser", "small letter", "UserRegistered"),
        ("REGISTERED", "capitals", "Registered"),
        ("user_profile", "underscores", None),
    ],
)
def test_a_name_that_is_not_camel_case_is_refused_as_that(name: str, reason: str, suggestion: str | None) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert problem.startswith(name)
    assert reason in problem
    assert "CamelCase" in problem
    assert _suggested(name) == suggestion


@pytest.mark.parametrize("name", ["", "_", "___"])
def test_a_name_without_a_word_is_refused(name: str) -> None:
    problem = problem_with(name)
    assert problem is not None
    assert "no word" in problem


@pytest.mark.parametrize(
    ("name", "participle"),
    [
        ("BestellungVerworfen", "Verworfen"),
        ("BestellungVerworfen", "verworfen"),
        ("VerworfenBestellung", "Verworfen"),
        ("UserProfile", "Profile"),
        ("KontoStillGelegt", "StillGelegt"),
        ("BestellungGelöscht", "Gelöscht"),
        ("BestellungGelöscht", unicodedata.normalize("NFD", "Gelöscht")),
        ("ÜberweisungAusgeführt", "Ausgeführt"),
        ("ЗаказОтправлен", "Отправлен"),
        ("注文出荷済み", "出荷済み"),
        ("SendWelcomeEmail", "Email"),
    ],
)
def test_the_authors_own_participle_makes_its_name_fine(name: str, participle: str) -> None:
    assert problem_with(name, participle) is None


@pytest.mark.parametrize(
    ("name", "participle"),
    [
        ("BestellungVerworfenheit", "Verworfen"),
        ("Bestellung", "Verworfen"),
        ("UserProfile", "file"),
        ("UserProfile", ""),
        ("SendWelcomeEmail", "Versandt"),
        ("KontoGelegtStill", "StillGelegt"),
    ],
)
def test_an_own_participle_that_is_not_among_the_words_is_refused(name: str, participle: str) -> None:
    problem = problem_with(name, participle)
    assert problem is not None
    assert problem.startswith(f'{name} declares participle="{participle}", which is not among the words')


def test_an_own_participle_that_a_fine_name_does_not_need_is_to_be_left_out() -> None:
    problem = problem_with("OrderShipped", "Versandt")
    assert problem is not None
    assert problem.endswith("leave participle= out.")


def test_an_own_participle_can_be_put_at_the_end() -> None:
    problem = problem_with("Bestellung", "Verworfen")
    assert problem is not None
    assert 'Call it "BestellungVerworfen"' in problem


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OAuthTokenRevoked", "OAuth Token Revoked"),
        ("HTTPRequestFailed", "HTTP Request Failed"),
        ("KYCCheckPassed", "KYC Check Passed"),
        ("User2FAEnabled", "User 2FA Enabled"),
        ("B2BInvoicePaid", "B2B Invoice Paid"),
        ("S3BucketCreated", "S3 Bucket Created"),
        ("URLsUpdated", "URLs Updated"),
        ("DocumentOCRed", "Document OCRed"),
        ("OrderShippedV2", "Order Shipped V2"),
        ("OrderShipped2", "Order Shipped 2"),
        ("Order2ndAttempted", "Order 2nd Attempted"),
        ("VATPaid", "VAT Paid"),
        ("ÜberweisungAusgeführt", "Überweisung Ausgeführt"),
        ("ЗаказОтправлен", "Заказ Отправлен"),
        ("注文済", "注 文 済"),
    ],
)
def test_a_name_is_split_where_a_reader_would(name: str, words: str) -> None:
    assert _past_tense._words(name) == words.split()


KNOWN_VERBS = sorted(_past_tense._VERBS | _past_tense._VERBS_AND_NOUNS | _past_tense._VERBS_WITH_PARTICLE)


@pytest.mark.parametrize("verb", KNOWN_VERBS)
def test_every_verb_known_has_a_participle_that_is_fine(verb: str) -> None:
    assert problem_with("Thing" + _past_tense._participle_of(verb).capitalize()) is None


def test_no_word_that_merely_ends_in_ed_is_a_participle() -> None:
    lookalikes = _listed(
        """
    Need Feed Speed Seed Embed Bed Red Exceed Proceed Succeed Breed Bleed Indeed Hundred Sacred Wicked Naked
    Weed Deed Greed Creed Heed Steed Kindred Hatred Shred Sled Newsfeed Infrared Newlywed Testbed
    """
    )
    assert [word for word in lookalikes if problem_with("Thing" + word) is None] == []


def test_the_participles_of_lookalikes_are_participles() -> None:
    words = _listed(
        """
    Needed Fed Sped Seeded Embedded Exceeded Proceeded Bred Bled Shed Weeded Shredded Led Wed
    """
    )
    assert [word for word in words if problem_with("Thing" + word) is not None] == []


def _suggested(name: str, participle: str | None = None) -> str | None:
    problem = problem_with(name, participle)
    found = re.search(r'Call it "([^"]*)"', problem or "")
    return found[1] if found else None


def _check_problem(name: str, participle: str | None) -> None:
    problem = problem_with(name, participle)
    if problem is None:
        return
    assert name in problem
    assert problem.endswith((".", ")."))
    assert len(re.findall(r"\. [A-Z]", problem.replace(name, "Name"))) <= 2, "more than three sentences"
    suggestion = _suggested(name, participle)
    if suggestion is not None:
        assert suggestion.isidentifier()
        assert problem_with(suggestion, participle) is None


WORDS = st.sampled_from(
    [word.capitalize() for word in KNOWN_VERBS]
    + sorted(_past_tense._TAIL_WORDS | _past_tense._AUXILIARIES | _past_tense._NEGATIONS, key=len)
    + _listed(
        """
    User Order Email Paid Sent Reset Processing Registers Login Payment HTTP 2FA V2 2 Event Domain O Auth B2B
    É 注 ª ß
    """
    )
).map(lambda word: word[:1].upper() + word[1:])
CAMEL_CASE = st.lists(WORDS, min_size=1, max_size=6).map("".join)
IDENTIFIERS = st.from_regex(r"[^\W\d]\w{0,40}", fullmatch=True).filter(str.isidentifier)


@settings(max_examples=600, deadline=None)
@given(name=st.one_of(CAMEL_CASE, IDENTIFIERS), participle=st.none() | CAMEL_CASE | IDENTIFIERS)
@example(name="Shipped" + "9" * 5000, participle=None)
@example(name="ªa_ß", participle=None)
@example(name="ŉ_x", participle=None)
@example(name="UserOrdered٢", participle=None)
def test_any_identifier_is_fine_or_gets_a_problem_whose_suggestion_is_fine(name: str, participle: str | None) -> None:
    _check_problem(name, participle)


@settings(max_examples=300, deadline=None)
@given(name=st.text(max_size=30), participle=st.none() | st.text(max_size=10))
def test_not_even_a_name_made_by_type_itself_breaks_the_rule(name: str, participle: str | None) -> None:
    problem = problem_with(name, participle)
    assert problem is None or name in problem or repr(name) in problem


@pytest.mark.parametrize("name", [word.capitalize() for word in keyword.kwlist if word.islower()])
def test_no_keyword_of_python_is_a_name_for_an_event(name: str) -> None:
    assert problem_with(name) is not None


def test_the_rule_is_loaded_with_nothing_but_what_every_interpreter_brings() -> None:
    script = (
        "import sys; from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('rule', {_past_tense.__file__!r})\n"
        "module = module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert module.problem_with('OrderShipped') is None\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'rule'}))"
    )
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["__main__"]
